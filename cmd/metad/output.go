package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"

	"github.com/urfave/cli/v3"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"metad/pkg/doctor"
)

// formats are the values of --output.
var formats = []string{"table", "json", "yaml"}

// output is where a command prints, and how. All that commands print of other programs' words goes
// through it: nothing that a terminal obeys is left.
type output struct {
	w      io.Writer
	format string // one of formats
	json   bool   // the format is JSON, whatever format is
}

func (o *output) flags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: formats[0],
			Usage: "table, json or yaml", Destination: &o.format,
			Action: func(_ context.Context, _ *cli.Command, v string) error {
				return oneOf("output", v, formats...)
			}},
		jsonFlag(&o.json),
	}
}

func jsonFlag(to *bool) cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "the same as --output=json", Destination: to}
}

// print prints v for programs, or what table writes for people.
func (o *output) print(v any, table func(io.Writer) error) error {
	switch {
	case o.json || o.format == "json":
		return printJSON(o.w, v)
	case o.format == "yaml":
		return printYAML(o.w, v)
	default:
		return table(printable{o.w})
	}
}

// next prints v as one of a series: as one line, or one document.
func (o *output) next(v any, table func(io.Writer) error) error {
	if o.json || o.format == "json" {
		return encodeJSON(o.w, v, "")
	}
	if o.format == "yaml" {
		fmt.Fprintln(o.w, "---")
	}
	return o.print(v, table)
}

// report prints r. Its error has r's exit code.
func (o *output) report(r doctor.Report) error {
	err := o.print(r, func(io.Writer) error {
		w := o.w
		if coloured(w) {
			w = statusColours{w}
		}
		lines := slices.Clone(r)
		for i, c := range lines {
			lines[i].Name, lines[i].Found, lines[i].Do =
				oneLine(c.Name), oneLine(c.Found), oneLine(c.Do)
		}
		_, err := lines.WriteTo(printable{w})
		return err
	})
	if err == nil && r.Status() != doctor.OK {
		return exitError{code: int(r.Status())}
	}
	return err
}

func printJSON(w io.Writer, v any) error { return encodeJSON(w, v, "  ") }

func encodeJSON(w io.Writer, v any, indent string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", indent)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	// JSON has no other escape for what is beyond 16 bits.
	text := beyond16Bits.ReplaceAllStringFunc(b.String(), func(s string) string {
		r := []rune(s)[0]
		if unicode.IsPrint(r) {
			return s
		}
		high, low := utf16.EncodeRune(r)
		return fmt.Sprintf(`\u%04x\u%04x`, high, low)
	})
	_, err := io.WriteString(printable{w}, text)
	return err
}

var beyond16Bits = regexp.MustCompile(`[\x{10000}-\x{10ffff}]`)

// printYAML prints the same as printJSON, in the same order: JSON is YAML in another style.
func printYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var doc yaml.Node
	// Characters that YAML does not allow are escapes then.
	if err := yaml.Unmarshal([]byte(shown(string(b), "")), &doc); err != nil {
		return err
	}
	plain(&doc)
	var text bytes.Buffer
	e := yaml.NewEncoder(&text)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(&doc), e.Close()); err != nil {
		return err
	}
	_, err = printable{w}.Write(text.Bytes())
	return err
}

// plain removes the style of JSON. Text that is shown by numbers stays in quotes: those are escapes
// there.
func plain(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode || shown(n.Value, "") == n.Value {
		n.Style = 0
	}
	for _, c := range n.Content {
		plain(c)
	}
}

// table is aligned text.
type table struct{ tw *tabwriter.Writer }

// newTable begins a table with its heads.
func newTable(w io.Writer, heads ...any) table {
	t := table{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
	t.row(heads...)
	return t
}

// row adds a row. A cell is shown on one line, whatever is in it.
func (t table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, c := range cells {
		texts[i] = oneLine(fmt.Sprint(c))
	}
	fmt.Fprintln(t.tw, strings.Join(texts, "\t"))
}

// print writes the table.
func (t table) print() error { return t.tw.Flush() }

// coloured reports whether w is a terminal that is to show colours: https://no-color.org.
func coloured(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// statusColours shows the status at the beginning of each line in colour.
type statusColours struct{ w io.Writer }

var (
	statuses     = regexp.MustCompile(`(?m)^(ok|warn|fail)\b`)
	statusColour = map[string]string{"ok": "32", "warn": "33", "fail": "31"}
)

// Write implements io.Writer. Each Write must hold whole lines.
func (s statusColours) Write(b []byte) (int, error) {
	text := statuses.ReplaceAllStringFunc(string(b), func(status string) string {
		return "\x1b[" + statusColour[status] + "m" + status + "\x1b[0m"
	})
	if _, err := io.WriteString(s.w, text); err != nil {
		return 0, err
	}
	return len(b), nil
}
