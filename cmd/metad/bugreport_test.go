package main

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// archived returns the files of an archive by their names without the directory.
func archived(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(h.Name)] = string(b)
	}
}

// reportHost has a configuration and a log with secrets in them, and no Docker Engine. It returns
// the arguments for a report and the file that is made.
func reportHost(t *testing.T, runDir string) (args []string, file string) {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "metad.yaml")
	if err := os.WriteFile(config, []byte("cluster: from-file\n"+
		"docker-host: tcp://u:zq7-url@127.0.0.1:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	journal := "#!/bin/sh\necho metad: docker-host tcp://u:zq7-log@127.0.0.1:1 " +
		"http://127.0.0.1/v2?token=zq7-query password=zq7-password " +
		"Authorization: Bearer zq7-bearer AKIAZQ7ZQ7ZQ7ZQ7ZQ7Z\n" +
		"printf 'a line of the log \\033[2J\\n'\n"
	if err := os.WriteFile(filepath.Join(dir, "journalctl"), []byte(journal),
		0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("ZQ7", "zq7-environment")
	t.Setenv("METAD_INTROSPECTION", "http://u:zq7-variable@127.0.0.1:1")
	file = filepath.Join(dir, "report.tar.gz")
	return []string{"bugreport", "--file", file, "--config", config, "--run-dir", runDir}, file
}

// A secret in the configuration, in the log, in a label and in an environment is not in the
// archive; everything that it is made for is.
func TestBugreport(t *testing.T) {
	runDir := adminServer(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/metrics":
			fmt.Fprintln(w, "metad_tasks 7")
		case "/healthz":
			fmt.Fprintln(w, "ok")
		case "/readyz":
			http.Error(w, "the Docker Engine has not answered yet",
				http.StatusServiceUnavailable)
		case "/verdicts":
			fmt.Fprintln(w, `[{"Name":"port_task","Packets":7}]`)
		default:
			fmt.Fprintln(w, `{"Tasks":[{"Family":"zq7-label"}]}`)
		}
	})
	args, file := reportHost(t, runDir)
	code, out, errs := command(args...)
	if code != codeOK || out != file+"\n" || errs != "" {
		t.Fatalf("got %d %q %q", code, out, errs)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", info.Mode(), err)
	}
	parts := archived(t, file)
	for part, want := range map[string]string{"version.txt": "map layout",
		"system.txt": "Linux", "config.txt": "from-file", "doctor.txt": "kernel",
		"verdicts.txt": "port_task", "metrics.txt": "metad_tasks 7", "health.txt": "ok",
		"ready.txt": "has not answered", "log.txt": "a line of the log"} {
		if !strings.Contains(parts[part], want) {
			t.Errorf("%s: want %q in %q", part, want, parts[part])
		}
	}
	for part, text := range parts {
		if strings.Contains(strings.ToLower(text), "zq7") ||
			strings.Contains(text, "\x1b") {
			t.Errorf("%s: a secret, or what a terminal obeys: %s", part, text)
		}
	}
	// It replaces nothing.
	if code, _, errs := command(args...); code != codeError ||
		!strings.Contains(errs, "file exists") {
		t.Errorf("again: got %d %s", code, errs)
	}
}

// A metad that hangs, one that talks without end, and none at all are in the report, which is made
// all the same.
func TestBugreportOfAHungMetad(t *testing.T) {
	f := func(runDir, metrics, verdicts string) {
		t.Helper()
		args, file := reportHost(t, runDir)
		if code, _, errs := command(args...); code != codeOK {
			t.Fatalf("got %d %s", code, errs)
		}
		parts := archived(t, file)
		got := parts["metrics.txt"]
		if !strings.Contains(got, metrics) || len(got) > maxPart {
			t.Errorf("metrics: got %.200q, %d bytes, want %q", got, len(got), metrics)
		}
		if got := parts["verdicts.txt"]; !strings.Contains(got, verdicts) {
			t.Errorf("verdicts: got %q, want %q", got, verdicts)
		}
	}
	f(t.TempDir(), "is metad running?", "is metad running?")
	f(adminServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/metrics" {
			<-r.Context().Done()
			return
		}
		for {
			if _, err := fmt.Fprintf(w, "%01000d", 0); err != nil {
				return
			}
		}
	}), "0000", "no answer within")
}
