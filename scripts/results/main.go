// Command results reads what the test guests of scripts/kernels/run or scripts/engines/run printed
// and prints a table of tests and guests. Its exit code is 0 only if every test has a result on
// every guest, none failed, none was skipped that the guest could have run, and no guest
// complained.
package main

import (
	"bufio"
	"cmp"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
)

func main() {
	tests := flag.String("tests", "",
		"folder with the test binaries that ran, named as their package with _ for /")
	run := flag.String("run", "^TestRoot", "pattern that the guests were given")
	skip := flag.String("skip", "", "pattern of tests that the guests left out")
	flag.Parse()
	ok, err := report(os.Stdout, *tests, *run, *skip, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "results:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// report writes the table of the guests whose results are at guest+".results".
func report(w io.Writer, tests, run, skip string, guests []string) (ok bool, err error) {
	want, err := list(tests, run, skip)
	if err != nil {
		return false, err
	}
	var results []*guest
	for _, path := range guests {
		f, err := os.Open(path + ".results")
		if err != nil {
			return false, err
		}
		g := parse(f)
		f.Close()
		g.name = filepath.Base(path)
		results = append(results, g)
	}
	return table(w, want, results), nil
}

// list returns the tests, as "package test", that the binaries in dir have and the guests ran.
func list(dir, run, skip string) ([]string, error) {
	left, err := regexp.Compile(skip)
	if err != nil {
		return nil, err
	}
	binaries, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, b := range binaries {
		pkg := strings.ReplaceAll(filepath.Base(b), "_", "/")
		out, err := exec.Command(b, "-test.list", run).Output()
		if err != nil {
			return nil, fmt.Errorf("list tests of %s: %w", pkg, err)
		}
		for name := range strings.FieldsSeq(string(out)) {
			if skip == "" || !left.MatchString(name) {
				all = append(all, pkg+" "+name)
			}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no test matches %q", run)
	}
	return all, nil
}

// guest is what one kernel's or Engine's run said.
type guest struct {
	name     string // as asked for: "6.1"
	release  string // of the kernel (uname -r) or of the Engine
	ended    bool   // it came to its end
	tests    map[string]*result
	problems []string // kernel messages, modules that did not load, binaries that ended badly
}

// result is one test's outcome; a subtest has its own.
type result struct {
	verdict string // PASS, FAIL, SKIP; "" while it has none
	seconds string // "1.23s"
	modes   map[string]bool
	output  []string
}

var (
	runLine    = regexp.MustCompile(`^=== (?:RUN|NAME|CONT|PAUSE)\s+(Test\S*)`)
	resultLine = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (Test\S*) \(([0-9.]+s)\)`)
	// A test that attaches says how, "attach mode: tcx", or has a subtest for each way.
	modeLine = regexp.MustCompile(`attach mode[:=] ?"?(tcx|clsact)\b`)
	modeTest = regexp.MustCompile(`/(tcx|clsact)$`)
	// A skip is right only on a kernel or an Engine that is too old: "needs Linux 6.6".
	needsLine = regexp.MustCompile(`needs (?:Linux|Docker Engine) (\d+\.\d+)`)
)

func parse(r io.Reader) *guest {
	g := &guest{tests: map[string]*result{}}
	var pkg string
	var current *result // whose output a line is; nil: nobody's
	get := func(name string) *result {
		key := pkg + " " + name
		if g.tests[key] == nil {
			g.tests[key] = &result{modes: map[string]bool{}}
		}
		return g.tests[key]
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		if word, rest, _ := strings.Cut(line, " "); strings.HasPrefix(word, "@") {
			current = nil
			switch word {
			case "@release":
				g.release = rest
			case "@package":
				pkg = rest
			case "@problem":
				g.problems = append(g.problems, rest)
			case "@exit":
				if rest != "0" {
					g.problems = append(g.problems,
						pkg+": the tests ended with code "+rest)
				}
			case "@end":
				g.ended = true
			}
			continue
		}
		if m := resultLine.FindStringSubmatch(line); m != nil {
			current = get(m[2])
			current.verdict, current.seconds = m[1], m[3]
			if mode := modeTest.FindStringSubmatch(m[2]); mode != nil &&
				m[1] == "PASS" {
				current.modes[mode[1]] = true
			}
			continue
		}
		if m := runLine.FindStringSubmatch(line); m != nil {
			current = get(m[1])
		}
		if current == nil {
			continue
		}
		current.output = append(current.output, line)
		for _, m := range modeLine.FindAllStringSubmatch(line, -1) {
			current.modes[m[1]] = true
		}
	}
	if !g.ended {
		g.problems = append(g.problems, "the guest did not come to its end")
	}
	return g
}

// cell returns a test's text in the table, whether it is good, and what it and those of its
// subtests printed that did not pass.
func (g *guest) cell(name string) (text string, ok bool, output []string) {
	top := g.tests[name]
	if top == nil {
		return "NO RESULT", false, nil
	}
	modes := map[string]bool{}
	skipped := false
	for _, sub := range slices.Sorted(maps.Keys(g.tests)) {
		r := g.tests[sub]
		if sub != name && !strings.HasPrefix(sub, name+"/") {
			continue
		}
		if r.verdict != "PASS" {
			output = append(output, r.output...)
		}
		maps.Copy(modes, r.modes)
		skipped = skipped || r.verdict == "SKIP" && g.needs(r) == ""
	}
	switch {
	case top.verdict == "":
		return "NO RESULT", false, output
	case skipped:
		return "SKIPPED", false, output
	case top.verdict == "SKIP":
		return "- (needs " + g.needs(top) + ")", true, output
	case top.verdict != "PASS":
		return top.verdict, false, output
	}
	text = strings.Join(append([]string{"ok", top.seconds}, slices.Sorted(maps.Keys(modes))...),
		" ")
	return text, true, output
}

// needs returns the release that a skipped test asks for if it is later than the guest's, else "".
func (g *guest) needs(r *result) string {
	m := needsLine.FindStringSubmatch(strings.Join(r.output, "\n"))
	if m == nil || !older(g.release, m[1]) {
		return ""
	}
	return m[1]
}

// older reports whether release a ("6.1.0-47-cloud-amd64", "26.1.5+dfsg1") is before version b
// ("6.6").
func older(a, b string) bool {
	var x, y [2]int
	fmt.Sscanf(a, "%d.%d", &x[0], &x[1])
	fmt.Sscanf(b, "%d.%d", &y[0], &y[1])
	return cmp.Or(cmp.Compare(x[0], y[0]), cmp.Compare(x[1], y[1])) < 0
}

// table prints tests × guests, then what went wrong, and reports whether nothing did.
func table(w io.Writer, want []string, guests []*guest) bool {
	good := true
	var wrong []string
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(tw, "test")
	for _, g := range guests {
		fmt.Fprintf(tw, "\t%s", cmp.Or(g.release, g.name+" (did not start)"))
	}
	fmt.Fprintln(tw)
	results := 0
	for _, name := range want {
		fmt.Fprint(tw, name)
		for _, g := range guests {
			text, ok, output := g.cell(name)
			fmt.Fprintf(tw, "\t%s", text)
			if ok {
				results++
				continue
			}
			good = false
			wrong = append(wrong, fmt.Sprintf("\n%s on %s: %s", name, g.name, text))
			wrong = append(wrong, output...)
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
	for _, line := range wrong {
		fmt.Fprintln(w, line)
	}
	for _, g := range guests {
		for _, p := range g.problems {
			good = false
			fmt.Fprintf(w, "%s: %s\n", g.name, p)
		}
	}
	fmt.Fprintf(w, "\n%d of %d results good on %d guests\n", results, len(want)*len(guests),
		len(guests))
	return good
}
