package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"
	"go.yaml.in/yaml/v3"
)

func configCommand(stdout io.Writer) *cli.Command {
	var c config
	var file string
	out := &output{w: stdout}
	flags := c.flags()
	probes := probeFlags(flags)
	return &cli.Command{
		Name: "config",
		Usage: "print the values that metad serve would use here, and where each comes " +
			"from; or check a file",
		Flags: slices.Concat([]cli.Flag{&cli.StringFlag{Name: "check",
			Usage: "check this file alone, and name the line of what is wrong",
			Local: true, Destination: &file}}, out.flags(), flags),
		Action: func(_ context.Context, cmd *cli.Command) error {
			if file != "" {
				err := checkConfigFile(file)
				if err == nil {
					fmt.Fprintln(printable{stdout}, file+": ok")
				}
				return err
			}
			all := settings(flags, probes, c.file.path)
			return errors.Join(out.print(all, func(w io.Writer) error {
				return printSettings(w, all)
			}), c.validate())
		},
	}
}

// setting is the value of a flag of metad serve.
type setting struct {
	Key    string
	Value  string // "off" where that is what the empty text means
	Source string // "flag", the name of a variable, the path of the file, or "default"
}

func printSettings(w io.Writer, all []setting) error {
	out := newTable(w, "KEY", "VALUE", "SOURCE")
	for _, s := range all {
		out.row(s.Key, s.Value, s.Source)
	}
	return out.print()
}

// probe is a source without a value. A flag asks its sources only if the command line does not have
// it: a probe that was not asked means that it does.
type probe struct{ asked bool }

// Lookup implements cli.ValueSource.
func (p *probe) Lookup() (string, bool) {
	p.asked = true
	return "", false
}
func (p *probe) String() string   { return "probe" }
func (p *probe) GoString() string { return "&probe{}" }

// probeFlags gives each of the flags a probe.
func probeFlags(flags []cli.Flag) []*probe {
	probes := make([]*probe, len(flags))
	for i, f := range flags {
		probes[i] = new(probe)
		sources := sourcesOf(f)
		sources.Chain = append([]cli.ValueSource{probes[i]}, sources.Chain...)
	}
	return probes
}

// sourcesOf returns where f's value comes from. f is one of the kinds that a flagSet makes.
func sourcesOf(f cli.Flag) *cli.ValueSourceChain {
	switch f := f.(type) {
	case *cli.StringFlag:
		return &f.Sources
	case *cli.StringSliceFlag:
		return &f.Sources
	case *cli.BoolFlag:
		return &f.Sources
	case *cli.DurationFlag:
		return &f.Sources
	case *cli.IntFlag:
		return &f.Sources
	}
	panic(fmt.Sprintf("flag %s: unknown kind %T", f.Names()[0], f))
}

// settings returns the values of flags that were parsed. file is the path of the config file.
func settings(flags []cli.Flag, probes []*probe, file string) []setting {
	all := make([]setting, len(flags))
	for i, f := range flags {
		all[i] = setting{f.Names()[0], valueOf(f), "flag"}
		if probes[i].asked {
			all[i].Source = sourceOf(f, file)
		}
	}
	return all
}

func valueOf(f cli.Flag) string {
	v := f.Get()
	if list, ok := v.([]string); ok {
		return strings.Join(list, ",")
	}
	if s, ok := f.(*cli.StringFlag); ok && v == "" && s.Action != nil {
		return off // a switchable flag
	}
	return fmt.Sprint(v)
}

// sourceOf returns which source a flag that is not on the command line has its value from, as
// cli.FlagBase.PostParse finds it.
func sourceOf(f cli.Flag, file string) string {
	_, text := f.(*cli.StringFlag)
	_, yes := f.(*cli.BoolFlag)
	for _, s := range sourcesOf(f).Chain {
		v, found := s.Lookup()
		if !found || v == "" && !text && !yes {
			continue
		}
		if env, ok := s.(cli.EnvValueSource); ok {
			return env.Key()
		}
		return file
	}
	return "default"
}

// checkConfigFile returns everything that is wrong with the file at path, a line for each, which
// begins with path and the number of the line. Neither the environment nor other flags count.
func checkConfigFile(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	values, err := parseConfig(b)
	wrong := allOf(err)
	var c config
	for _, f := range c.flags() {
		name := f.Names()[0]
		if err := f.PreParse(); err != nil {
			return err
		}
		v := values[name]
		if v == "" { // not there, or wrong and said so
			continue
		}
		if err := f.Set(name, v); err != nil {
			wrong = append(wrong, fmt.Errorf("%s %q: %w", name, v, err))
		} else if f, ok := f.(cli.ActionableFlag); ok {
			wrong = append(wrong, allOf(f.RunAction(context.Background(), nil))...)
		}
	}
	lines := linesOf(b)
	var located []error
	for _, err := range append(wrong, allOf(c.validate())...) {
		located = append(located, locate(path, lines, err))
	}
	return errors.Join(located...)
}

// locate puts path before err, and the line that err is about: its own, or that of the key that it
// begins with, or of one that it names. Errors of YAML itself name their line.
func locate(path string, lines map[string]int, err error) error {
	var at lineError
	if errors.As(err, &at) {
		return fmt.Errorf("%s:%d: %w", path, at.line, at.error)
	}
	words := strings.FieldsFunc(err.Error(), func(r rune) bool {
		return r != '-' && (r < 'a' || r > 'z')
	})
	for _, word := range words {
		if line, ok := lines[word]; ok {
			return fmt.Errorf("%s:%d: %w", path, line, err)
		}
	}
	return fmt.Errorf("%s: %w", path, err)
}

// allOf returns the errors that were joined to err.
func allOf(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error }) //nolint:errorlint // not in its chain
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, allOf(e)...)
	}
	return all
}

// linesOf returns the line of each key of a file, from 1.
func linesOf(file []byte) map[string]int {
	var doc yaml.Node
	lines := map[string]int{}
	if yaml.Unmarshal(file, &doc) != nil || len(doc.Content) == 0 {
		return lines
	}
	root := doc.Content[0]
	for i := 0; i < len(root.Content); i += 2 {
		lines[root.Content[i].Value] = root.Content[i].Line
	}
	return lines
}
