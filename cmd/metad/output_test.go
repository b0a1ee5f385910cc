package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"

	"go.yaml.in/yaml/v3"

	"metad/pkg/doctor"
)

// adminServer answers at the admin socket of the run directory that it returns.
func adminServer(t *testing.T, h http.HandlerFunc) (runDir string) {
	t.Helper()
	runDir = t.TempDir()
	ln, err := net.Listen("unix", adminSocket(runDir))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return runDir
}

// command runs metad and returns its exit code, and what it printed.
func command(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), append([]string{"metad"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

// asking are the commands that ask a running metad once.
var asking = [][]string{{"tasks"}, {"map"}, {"verdicts"}, {"events"}, {"explain", "web"}}

// A running metad that takes connections and says nothing, or begins an answer that never ends,
// holds no command for ever, and the error says what to look at.
func TestCommandsEndIfMetadHangs(t *testing.T) {
	t.Parallel()
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, begin := range []string{"", "[\n"} {
		runDir := adminServer(t, func(w http.ResponseWriter, r *http.Request) {
			if begin != "" {
				io.WriteString(w, begin)
				w.(http.Flusher).Flush()
			}
			<-r.Context().Done()
		})
		all := asking
		if begin == "" {
			all = append(all[:len(all):len(all)], []string{"events", "--follow"},
				[]string{"top", "--once"})
		}
		for _, args := range all {
			wg.Go(func() {
				code, out, errs := command(append(args, "--run-dir", runDir)...)
				if code != codeError || out != "" ||
					!strings.Contains(errs, "no answer within") {
					t.Errorf("%q: got %d %q %q", args, code, out, errs)
				}
			})
		}
	}
}

// Every command prints the same data as JSON and as YAML, in the format that was asked for, and
// nothing that a terminal obeys, whatever the running metad says.
func TestFormats(t *testing.T) {
	const evil = "a\x1b[2Jb\u009b\nc\u202e\U000e0001: \"é😀"
	answers := map[string]any{
		"/tasks": map[string]any{"Version": evil, "Tasks": []any{map[string]any{
			"ID": evil, "Family": evil, "Endpoints": []any{map[string]any{
				"Address": evil}}}}},
		"/map": []mapEntry{{Address: "172.17.0.2", Task: evil, Device: evil, MAC: evil,
			Packets: 1 << 60}},
		"/verdicts": []verdict{{Name: evil, Packets: 7, Meaning: "a\u202eb"}},
		"/explain":  doctor.Report{{Name: evil, Found: evil, Do: evil}},
	}
	runDir := adminServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/events" {
			for range 2 {
				json.NewEncoder(w).Encode(event{Verdict: evil, Task: evil})
			}
			return
		}
		json.NewEncoder(w).Encode(answers[r.URL.Path])
	})
	print := func(format string, args []string) string {
		t.Helper()
		code, out, errs := command(append(args, "-o", format, "--run-dir", runDir)...)
		if code != codeOK || errs != "" {
			t.Errorf("%q as %s: got %d %s", args, format, code, errs)
		}
		if strings.ContainsAny(out, "\x1b\u009b\u202e\U000e0001") {
			t.Errorf("%q as %s: a terminal would obey %q", args, format, out)
		}
		return out
	}
	quoted, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range asking {
		print("table", args)
		dec := json.NewDecoder(strings.NewReader(print("json", args)))
		dec.UseNumber()
		fromJSON := decoded(t, dec)
		fromYAML := decoded(t, yaml.NewDecoder(strings.NewReader(print("yaml", args))))
		if len(fromJSON) == 0 || !reflect.DeepEqual(fromJSON, fromYAML) ||
			!strings.Contains(fmt.Sprint(fromJSON), strings.Trim(string(quoted), `"`)) {
			t.Errorf("%q: JSON has %v, YAML %v", args, fromJSON, fromYAML)
		}
	}
}

// decoded returns all that d has, each as JSON.
func decoded(t *testing.T, d interface{ Decode(any) error }) []string {
	t.Helper()
	var all []string
	for {
		var v any
		err := d.Decode(&v)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(b))
	}
}

// The statuses of a report have colours only if they were asked for, and text that begins a line
// with one cannot be told from it by the colour of the rest.
func TestReportColours(t *testing.T) {
	var plain, colours bytes.Buffer
	report := doctor.Report{{Name: "a", Status: doctor.Warn, Found: "x\nfail  b", Do: "y"}}
	for w, b := range map[io.Writer]*bytes.Buffer{&plain: &plain,
		statusColours{&colours}: &colours} {
		err := (&output{w: w}).report(report)
		if e := (exitError{}); !errors.As(err, &e) || e.code != int(doctor.Warn) {
			t.Errorf("got %v", err)
		}
		if n := strings.Count(b.String(), "\n"); n != 2 {
			t.Errorf("got %d lines: %q", n, b)
		}
	}
	want := strings.Replace(plain.String(), "warn", "\x1b[33mwarn\x1b[0m", 1)
	if colours.String() != want {
		t.Errorf("got %q, want %q", &colours, want)
	}
	if coloured(&plain) || coloured(os.Stdin) {
		t.Error("what is no terminal gets colours")
	}
}

// metad --version, metad -v and metad version say the same.
func TestVersion(t *testing.T) {
	_, want, _ := command("version")
	for _, line := range []string{"metad " + version, "commit ", "go1.", "map layout "} {
		if !strings.Contains(want, line) {
			t.Errorf("%q is not in %q", line, want)
		}
	}
	for _, args := range [][]string{{"--version"}, {"-v"}} {
		code, out, errs := command(args...)
		if code != codeOK || out != want || errs != "" {
			t.Errorf("%q: got %d %q %q, want %q", args, code, out, errs, want)
		}
	}
	var b build
	if _, out, _ := command("version", "-o", "json"); json.Unmarshal([]byte(out), &b) != nil ||
		b.Layout == 0 || b.Version != version {
		t.Errorf("got %+v of %s", b, out)
	}
}

// A shell gets a script, and the script gets commands and flags by it.
func TestCompletion(t *testing.T) {
	f := func(want string, args ...string) {
		t.Helper()
		if code, out, errs := command(args...); code != codeOK ||
			!strings.Contains(out, want) || errs != "" {
			t.Errorf("%q: got %d %q %q, want %q", args, code, out, errs, want)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		f("--generate-shell-completion", "completion", shell)
	}
	defer func(args []string) { os.Args = args }(os.Args)
	os.Args = []string{"metad", "--generate-shell-completion"} // the library reads it
	f("explain:", "--generate-shell-completion")
	f("--run-dir:", "tasks", "--", "--generate-shell-completion")
	f("--admin-group:", "serve", "--ad", "--generate-shell-completion")
}
