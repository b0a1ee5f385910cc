package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	docs "github.com/urfave/cli-docs/v3"
	"github.com/urfave/cli/v3"
	"go.yaml.in/yaml/v3"
)

// packageFiles is how packaging/build gets what packages hold beside the program. All of it is
// made of the commands and flags themselves, and cannot differ from them.
var packageFiles = flag.String("package-files", "", "`directory` that TestPackageFiles writes to")

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

// The man page names every command and every flag that users see, and no command that is hidden.
func TestPackageFiles(t *testing.T) {
	dir := *packageFiles
	if dir == "" {
		dir = t.TempDir()
	}
	if err := generate(dir); err != nil {
		t.Fatal(err)
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
	for _, cmd := range app(io.Discard, io.Discard).Commands {
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

// generate writes metad.yaml, metad.8, metad.bash, _metad (zsh) and metad.fish into dir.
func generate(dir string) error {
	man, err := docs.ToManWithSection(app(io.Discard, io.Discard), 8)
	if err != nil {
		return fmt.Errorf("generate the man page: %w", err)
	}
	file, err := exampleConfig()
	if err != nil {
		return fmt.Errorf("generate the configuration file: %w", err)
	}
	files := map[string]string{"metad.8": man, "metad.yaml": file}
	for shell, name := range map[string]string{
		"bash": "metad.bash", "zsh": "_metad", "fish": "metad.fish"} {
		var b bytes.Buffer
		root := app(&b, io.Discard)
		root.EnableShellCompletion = true
		err := root.Run(context.Background(), []string{root.Name, "completion", shell})
		if err != nil {
			return fmt.Errorf("generate the completion for %s: %w", shell, err)
		}
		files[name] = b.String()
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// exampleConfig returns a configuration file with every key commented out: a line of help, and
// below it the key with its default.
func exampleConfig() (string, error) {
	var b strings.Builder
	b.WriteString("# Configuration of metad. A key that is commented out shows the default.\n" +
		"# A flag of metad serve, or a variable METAD_*, wins over this file.\n")
	category := ""
	for _, f := range new(config).flags() {
		name := f.Names()[0]
		if name == "config" {
			continue
		}
		if c := f.(cli.CategorizableFlag).GetCategory(); c != category {
			category = c
			fmt.Fprintf(&b, "\n## %s\n", category)
		}
		def, err := fileDefault(f)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(&b, "\n# %s\n#%s: %s\n", f.(cli.DocGenerationFlag).GetUsage(), name,
			def)
	}
	return b.String(), nil
}

// noDefault stands where a key has no default that could be written: an empty value is an error.
const noDefault = "# no default"

// fileDefault returns a flag's default as it stands in the configuration file.
func fileDefault(f cli.Flag) (string, error) {
	var value any
	switch f := f.(type) {
	case *cli.StringFlag:
		value = f.Value
		if f.Value == "" && f.Action != nil { // switchable: the empty text means off
			value = off
		}
	case *cli.StringSliceFlag:
		list := &yaml.Node{}
		if err := list.Encode(f.Value); err != nil {
			return "", err
		}
		list.Style = yaml.FlowStyle
		value = list
		if len(f.Value) == 0 {
			value = ""
		}
	case *cli.BoolFlag:
		value = f.Value
	case *cli.IntFlag:
		value = f.Value
	case *cli.DurationFlag:
		value = f.Value.String()
	default:
		return "", fmt.Errorf("a flag of type %T", f)
	}
	if value == "" {
		return noDefault, nil
	}
	text, err := yaml.Marshal(value)
	return strings.TrimSpace(string(text)), err
}
