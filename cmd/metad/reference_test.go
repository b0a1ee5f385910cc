package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	dto "github.com/prometheus/client_model/go"
	"github.com/urfave/cli/v3"

	"metad/bpf"
	"metad/internal/expect"
	"metad/pkg/admin"
	"metad/pkg/cadvisor"
	"metad/pkg/introspection"
	"metad/pkg/server"
	"metad/pkg/stats"
	"metad/pkg/task"
)

// The pages of docs/reference say what the code says. With -update (make docs) they are written
// anew.
func TestReference(t *testing.T) {
	for name, write := range map[string]func(*testing.T, *page){
		"flags": flagsPage, "commands": commandsPage, "http": httpPage,
		"metrics": metricsPage, "verdicts": verdictsPage, "exit-codes": exitCodesPage,
	} {
		t.Run(name, func(t *testing.T) {
			var p page
			p.WriteString("<!-- Written by make docs, from the code. -->\n")
			write(t, &p)
			expect.Golden(t, "../../docs/reference/"+name+".md", []byte(p.String()))
		})
	}
}

// page is a page in Markdown.
type page struct{ strings.Builder }

// text writes paragraphs, headings among them.
func (p *page) text(paragraphs ...string) {
	for _, text := range paragraphs {
		fmt.Fprintf(p, "\n%s\n", text)
	}
}

// table begins a table.
func (p *page) table(heads ...string) {
	p.WriteByte('\n')
	p.row(heads...)
	p.row(slices.Repeat([]string{"---"}, len(heads))...)
}

func (p *page) row(cells ...string) {
	for _, cell := range cells {
		p.WriteString("| " + strings.ReplaceAll(cell, "|", `\|`) + " ")
	}
	p.WriteString("|\n")
}

// code returns each of words as code, with commas between.
func code(words ...string) string {
	var all []string
	for _, w := range words {
		if w != "" {
			all = append(all, "`"+w+"`")
		}
	}
	return strings.Join(all, ", ")
}

// documented is a flag with what its help shows.
type documented interface {
	cli.Flag
	cli.DocGenerationFlag
	cli.CategorizableFlag
	cli.VisibleFlag
}

func flagsPage(_ *testing.T, p *page) {
	p.text("# Flags of metad serve", "A flag wins over its variables, a variable over those "+
		"after it, and all of them over the file.\nThe keys of the file are the flags' "+
		"names without the dashes.\n`metad config` prints the value of each and where "+
		"it comes from.")
	category := ""
	for _, f := range new(config).flags() {
		f := f.(documented)
		if c := f.GetCategory(); c != category {
			category = c
			p.text("## " + strings.ToUpper(c[:1]) + c[1:])
			p.table("flag", "default", "variables", "")
		}
		def := valueOf(f)
		p.row(code("--"+f.Names()[0]), code(def), code(f.GetEnvVars()...), f.GetUsage())
	}
}

func commandsPage(t *testing.T, p *page) {
	root := app(io.Discard, io.Discard)
	if err := root.Run(t.Context(), []string{"metad", "--help"}); err != nil {
		t.Fatal(err) // it adds commands of the library
	}
	ofServe := map[string]bool{}
	for _, f := range new(config).flags() {
		ofServe[f.Names()[0]] = true
	}
	p.text("# Commands", "`metad <command> --help` says the same.\n"+
		"The exit codes are in [exit-codes.md](exit-codes.md).")
	for _, c := range root.Commands {
		if c.Hidden || c.Name == "help" {
			continue
		}
		name := "metad " + c.Name
		p.text("## "+name, strings.ToUpper(c.Usage[:1])+c.Usage[1:]+".")
		if c.ArgsUsage != "" {
			p.text(code(name + " " + c.ArgsUsage))
		}
		var shells []string
		for _, sub := range c.Commands {
			if sub.Name != "help" {
				shells = append(shells, name+" "+sub.Name)
			}
		}
		if shells != nil {
			p.text(code(shells...))
		}
		commandFlags(p, c, ofServe)
	}
}

// commandFlags writes the flags of c: its own, and which it has of those of metad serve.
func commandFlags(p *page, c *cli.Command, ofServe map[string]bool) {
	var shared []string
	begun := false
	for _, f := range c.Flags {
		f, ok := f.(documented)
		if !ok || !f.IsVisible() || f.Names()[0] == "help" {
			continue
		}
		if ofServe[f.Names()[0]] {
			shared = append(shared, "--"+f.Names()[0])
			continue
		}
		if !begun {
			p.table("flag", "default", "")
			begun = true
		}
		var names []string
		for _, n := range f.Names() {
			names = append(names, strings.Repeat("-", min(len(n), 2))+n)
		}
		p.row(code(names...), code(valueOf(f)), f.GetUsage())
	}
	switch len(shared) {
	case 0:
	case len(ofServe):
		p.text("It has [all flags of metad serve](flags.md).")
	default:
		p.text("It has these [flags of metad serve](flags.md): " + code(shared...) + ".")
	}
}

func httpPage(t *testing.T, p *page) {
	p.text("# HTTP paths",
		"## For containers: 169.254.170.2",
		"`{container}` is a container's endpoint id; or `self`, or nothing at all: the "+
			"container that asks; or `containers/` and a name in the task that asks.\n"+
			"metad passes every other path on to the ECS agent.\n"+
			"Where the answers differ from the agent's is in "+
			"[compatibility.md](../compatibility.md).")
	p.table("path", "answer")
	for _, r := range server.Routes() {
		p.row(code(r.Path), r.Answer)
	}
	p.text("## For the operator: the admin address and the admin socket",
		"The address is `--admin`, "+code(defaultAdmin)+" by default; the socket is "+
			"`admin.sock` in `--run-dir`, "+code(defaultRunDir+"/admin.sock")+
			" by default.\nAll paths are for `GET`.")
	p.table("path", "where", "answer")
	looks := (&daemon{}).looks()
	for _, path := range append(slices.Clone(admin.Paths), lookPaths...) {
		where := "both"
		if path.SocketOnly {
			where = "socket"
		}
		p.row(code(path.Path), where, path.What)
		delete(looks, path.Path)
	}
	for path := range looks {
		t.Errorf("%s: lookPaths does not say what it answers", path)
	}
	p.text("## For agents of other makers: the introspection API",
		"On a host without an ECS agent, at `--introspection`.")
	p.table("path")
	for _, path := range introspectionPaths(t) {
		p.row(code(path))
	}
}

// introspectionPaths asks the API for its paths.
func introspectionPaths(t *testing.T) []string {
	t.Helper()
	s, err := introspection.Listen(introspection.Config{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(t.Context())
	resp, err := http.Get("http://" + s.Addr().String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list struct{ AvailableCommands []string }
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	return list.AvailableCommands
}

func metricsPage(t *testing.T, p *page) {
	p.text("# Metrics", "## metad itself: /metrics",
		"Beside these there are those of Go and of the process (`go_*`, `process_*`).\n"+
			"Histograms are native and classic in one: Prometheus takes the native "+
			"form if it is configured to scrape native histograms.")
	p.table("metric", "kind", "labels", "")
	families, err := everyMetric(t).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "metad_") {
			p.row(code(f.GetName()), strings.ToLower(f.GetType().String()),
				labelsOf(f), f.GetHelp())
		}
	}
	p.text("## Containers: /metrics/containers",
		"With `--container-metrics`.\nNames and units are cAdvisor's.\n"+
			"Every series has the labels `container`, `family`, `id`, `image`, `name` "+
			"and `task`; those of networks have `interface`, those of disks `device`.")
	p.table("metric", "kind", "")
	w := httptest.NewRecorder()
	cadvisor.New(noCounters{}).ServeHTTP(w, nil)
	help := ""
	for line := range strings.Lines(w.Body.String()) {
		words := strings.SplitN(strings.TrimSpace(line), " ", 4)
		if words[1] == "HELP" {
			help = words[3]
			continue
		}
		p.row(code(words[2]), words[3], help)
	}
}

// noCounters is a host without a container.
type noCounters struct{}

func (noCounters) EachKept(func(*task.Task, *task.Container, *stats.Counters)) {}

// labelsOf returns the labels of f, each with its values if they do not depend on the machine.
func labelsOf(f *dto.MetricFamily) string {
	values := map[string]map[string]bool{}
	for _, m := range f.Metric {
		for _, l := range m.Label {
			if values[l.GetName()] == nil {
				values[l.GetName()] = map[string]bool{}
			}
			values[l.GetName()][l.GetValue()] = true
		}
	}
	var all []string
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if slices.Contains([]string{"version", "goversion", "verdict", "route"}, name) {
			all = append(all, code(name))
			continue
		}
		all = append(all, code(name)+": "+code(slices.Sorted(maps.Keys(values[name]))...))
	}
	return strings.Join(all, "; ")
}

func verdictsPage(t *testing.T, p *page) {
	p.text("# Verdicts", "How a packet ended, as the eBPF programs count it.\n"+
		"The number is the key in the pinned map `verdicts`.\n"+
		"`metad verdicts` prints names and counts, `metad_verdicts_total` has them for "+
		"Prometheus, and [bpftool.md](../how-to/bpftool.md) says how to read the map.")
	p.table("number", "verdict", "")
	spec, err := bpf.LoadMetad()
	if err != nil {
		t.Fatal(err)
	}
	var e *btf.Enum
	if err := spec.Types.TypeByName("verdict", &e); err != nil {
		t.Fatal(err)
	}
	values := slices.Clone(e.Values)
	slices.SortFunc(values, func(a, b btf.EnumValue) int {
		return cmp.Compare(a.Value, b.Value)
	})
	for _, v := range values {
		if v.Value < uint64(bpf.VerdictLimit) {
			name := strings.ToLower(strings.TrimPrefix(v.Name, "VERDICT_"))
			p.row(fmt.Sprint(v.Value), code(name), meanings[name])
		}
	}
}

func exitCodesPage(_ *testing.T, p *page) {
	p.text("# Exit codes", "A signal that metad does not catch ends it as it ends every "+
		"process.")
	p.table("code", "commands", "")
	for _, c := range exitCodes {
		p.row(fmt.Sprint(c.code), c.commands, c.means)
	}
}
