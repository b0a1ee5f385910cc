package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	docs "github.com/urfave/cli-docs/v3"
	"github.com/urfave/cli/v3"
	"go.yaml.in/yaml/v3"
)

// generateCommand writes what packages hold beside the program. All of it is made of the commands
// and flags themselves, and cannot differ from them.
func generateCommand() *cli.Command {
	return &cli.Command{
		Name:      "generate",
		Hidden:    true,
		Usage:     "write the man page, the completions and a configuration file for packages",
		ArgsUsage: "<directory>",
		Action: func(_ context.Context, cmd *cli.Command) error {
			if cmd.Args().Len() != 1 {
				return errors.New("generate: want one directory")
			}
			return generate(cmd.Args().First())
		},
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
		// Not generate's own context: with it this would be a command below generate.
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
		fmt.Fprintf(&b, "\n# %s\n#%s: %s\n", f.(cli.DocGenerationFlag).GetUsage(), name, def)
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
