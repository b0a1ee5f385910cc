package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

const (
	// reportTime bounds the making of one part, of which all are made at once.
	reportTime = 20 * time.Second
	// maxPart is the most of one part, in bytes.
	maxPart = 4 << 20
)

func bugreportCommand(stdout io.Writer) *cli.Command {
	var c config
	var file string
	return &cli.Command{
		Name: "bugreport",
		Usage: "put what a bug report needs into one archive: metad doctor, versions, " +
			"verdicts, configuration, metrics and the last log lines; no labels, " +
			"no environment of containers, no secrets",
		Flags: append(c.flagsNamed("config", "run-dir"), &cli.StringFlag{Name: "file",
			Usage: "the archive to make", Value: "metad-bugreport-<time>.tar.gz",
			Destination: &file, HideDefault: true}),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			now := time.Now().UTC()
			if !cmd.IsSet("file") {
				file = now.Format("metad-bugreport-20060102T150405Z.tar.gz")
			}
			parts := collect(ctx, reportParts(c.file.path, c.runDir))
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := writeArchive(file, parts, now); err != nil {
				return fmt.Errorf("bugreport: %w", err)
			}
			fmt.Fprintln(printable{stdout}, file)
			return nil
		},
	}
}

// reportPart is a file of the archive.
type reportPart struct {
	name string
	make func(context.Context, io.Writer) error
}

// reportParts are the files of the archive. None of them has what containers are told or tell:
// neither tasks nor events are among them.
func reportParts(configFile, runDir string) []reportPart {
	return []reportPart{
		{"version.txt", ofCommand("version")},
		{"system.txt", system},
		{"config.txt", ofCommand("config", "--config", configFile)},
		{"doctor.txt", ofCommand("doctor", "--config", configFile, "--run-dir", runDir)},
		{"verdicts.txt", ofCommand("verdicts", "--all", "--run-dir", runDir)},
		{"metrics.txt", ofSocket(runDir, "/metrics")},
		{"health.txt", ofSocket(runDir, "/healthz")},
		{"ready.txt", ofSocket(runDir, "/readyz")},
		{"log.txt", lastLog},
	}
}

// ofCommand is what a command of this program prints, its errors and its exit code.
func ofCommand(args ...string) func(context.Context, io.Writer) error {
	return func(ctx context.Context, w io.Writer) error {
		code := run(ctx, append([]string{"metad"}, args...), w, w)
		_, err := fmt.Fprintf(w, "(exit code %d)\n", code)
		return err
	}
}

// ofSocket is what the running metad answers at path.
func ofSocket(runDir, path string) func(context.Context, io.Writer) error {
	return func(ctx context.Context, w io.Writer) error {
		ctx, cancel := context.WithTimeout(ctx, answerTime)
		defer cancel()
		body, err := askSocket(ctx, runDir, path)
		if err != nil {
			return err
		}
		defer body.Close()
		_, err = io.Copy(w, io.LimitReader(body, maxPart))
		return unread(ctx, adminSocket(runDir), path, err)
	}
}

// system is the kernel and the distribution; doctor.txt has the Engine.
func system(_ context.Context, w io.Writer) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	fmt.Fprintln(w, unix.ByteSliceToString(u.Sysname[:]),
		unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]),
		unix.ByteSliceToString(u.Machine[:]))
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// lastLog is the end of metad's log, if it is in systemd's journal.
func lastLog(ctx context.Context, w io.Writer) error {
	cmd := exec.CommandContext(ctx, "journalctl", "--unit=metad", "--lines=1000", "--no-pager",
		"--output=short-iso")
	cmd.Stdout, cmd.Stderr = w, w
	cmd.WaitDelay = time.Second
	return cmd.Run()
}

// collect makes the parts, at once. The error of one is its text. Nothing of them is a secret, and
// nothing is obeyed by a terminal.
func collect(ctx context.Context, parts []reportPart) map[string][]byte {
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	var (
		mu  sync.Mutex // guards all
		all = map[string][]byte{}
		wg  sync.WaitGroup
	)
	for _, p := range parts {
		wg.Go(func() {
			text := limited{left: maxPart}
			if err := p.make(ctx, &text); err != nil {
				fmt.Fprintf(&text, "error: %v\n", err)
			}
			mu.Lock()
			defer mu.Unlock()
			all[p.name] = []byte(shown(withoutSecrets(text.kept.String()), "\n\t"))
		})
	}
	wg.Wait()
	return all
}

// limited is a buffer that forgets what is too much.
type limited struct {
	kept bytes.Buffer
	left int // bytes
}

// Write implements io.Writer.
func (l *limited) Write(b []byte) (int, error) {
	n := min(len(b), l.left)
	l.left -= n
	l.kept.Write(b[:n])
	return len(b), nil
}

// secrets are what looks like one: the user of a URL and what comes after its path, values that are
// named so, and access keys of AWS.
var secrets = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(`([a-z][a-z0-9+.-]*://)[^/@\s"']*@`), "${1}…@"},
	{regexp.MustCompile(`([a-z][a-z0-9+.-]*://[^?#\s"']*)[?#][^\s"']*`), "${1}?…"},
	{regexp.MustCompile(`(?i)((?:secret|token|passw(?:or)?d|credentials?|authorization|api_?key)` +
		`[\w-]*["']?\s*[:=]\s*["']?)(?:(?:basic|bearer)\s+)?[^\s"',}]+`), "${1}…"},
	{regexp.MustCompile(`\b(AKIA|ASIA)[A-Z0-9]{12,}\b`), "${1}…"},
}

func withoutSecrets(text string) string {
	for _, s := range secrets {
		text = s.pattern.ReplaceAllString(text, s.with)
	}
	return text
}

// writeArchive makes the file, for its owner alone, of parts. It replaces nothing, and leaves
// nothing behind if it fails.
func writeArchive(file string, parts map[string][]byte, now time.Time) (err error) {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(file))
		}
	}()
	zip := gzip.NewWriter(f)
	out := tar.NewWriter(zip)
	dir := now.Format("metad-bugreport-20060102T150405Z")
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		text := parts[name]
		if err := out.WriteHeader(&tar.Header{Name: dir + "/" + name, Mode: 0o600,
			Size: int64(len(text)), ModTime: now}); err != nil {
			return err
		}
		if _, err := out.Write(text); err != nil {
			return err
		}
	}
	return errors.Join(out.Close(), zip.Close())
}
