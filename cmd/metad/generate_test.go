package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// The configuration file that packages install has every flag of serve as a key, once. The
// defaults that it shows are the flags': a file with all of them in force changes nothing.
func TestExampleConfig(t *testing.T) {
	text, err := exampleConfig()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "metad.yaml")
	write := func(text string) *config {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := parse(t, "--config", file)
		if err != nil {
			t.Fatalf("%v in:\n%s", err, text)
		}
		c.file = configFile{}
		return c
	}
	want := write("")
	if got := write(text); !reflect.DeepEqual(got, want) {
		t.Errorf("as installed: got %+v, want %+v", got, want)
	}

	key := regexp.MustCompile(`(?m)^#([a-z-]+): (.+)$`)
	var active strings.Builder
	seen := map[string]int{}
	for _, m := range key.FindAllStringSubmatch(text, -1) {
		seen[m[1]]++
		if m[2] != noDefault {
			active.WriteString(m[1] + ": " + m[2] + "\n")
		}
	}
	if got := write(active.String()); !reflect.DeepEqual(got, want) {
		t.Errorf("every default in force: got %+v, want %+v", got, want)
	}
	for _, f := range new(config).flags() {
		if name := f.Names()[0]; name != "config" && seen[name] != 1 {
			t.Errorf("%s: got %d times, want once", name, seen[name])
		}
	}
	if strings.Count(active.String(), "\n") < 25 {
		t.Errorf("few keys have a default:\n%s", active.String())
	}
}

// The man page names every command and every flag that users see, and none that is hidden.
func TestGenerate(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	if code := run(context.Background(), []string{"metad", "generate", dir}, &out,
		&out); code != 0 {
		t.Fatalf("got code %d: %s", code, &out)
	}
	read := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(string(b), `\-`, "-")
	}
	man := read("metad.8")
	for _, cmd := range app(&out, &out).Commands {
		if got := regexp.MustCompile(`(?m)^\.SH `+cmd.Name+`\b`).MatchString(man) ||
			regexp.MustCompile(`(?m)^\.SS `+cmd.Name+`\b`).MatchString(man); got ==
			cmd.Hidden {
			t.Errorf("command %s: got %v, hidden %v", cmd.Name, got, cmd.Hidden)
		}
	}
	for _, f := range new(config).flags() {
		if name := "--" + f.Names()[0]; !strings.Contains(man, name) {
			t.Errorf("the man page lacks %s", name)
		}
	}
	for _, name := range []string{"metad.bash", "_metad", "metad.fish"} {
		if text := read(name); !strings.Contains(text, "complete") ||
			!strings.Contains(text, "metad") {
			t.Errorf("%s: got %q", name, text)
		}
	}
}
