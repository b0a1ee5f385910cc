// Command longest prints the ten longest functions and the ten longest files among the Go and C
// files that it is given; tests and generated files do not count. It fails if a line of any of them
// is wider than 100 columns without a reason.
package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strings"
)

// shown is how many of each kind are printed.
const shown = 10

// sized is a function or a file with its length.
type sized struct {
	lines int
	name  string
}

func main() {
	functions, files, wide, err := measure(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "longest:", err)
		os.Exit(1)
	}
	show("functions", functions)
	show("files", files)
	if len(wide) > 0 {
		fmt.Fprintf(os.Stderr, "lines over %d columns:\n%s\n", columns,
			strings.Join(wide, "\n"))
		os.Exit(1)
	}
}

// measure returns the lengths, in lines, of the functions and of the files at paths, and the lines
// that are too wide as "path:line".
func measure(paths []string) (functions, files []sized, wide []string, err error) {
	for _, path := range paths {
		src, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, nil, err
		}
		lines := strings.Split(strings.TrimSuffix(string(src), "\n"), "\n")
		reason := map[int]bool{}
		if strings.HasSuffix(path, ".go") {
			set := token.NewFileSet()
			const mode = parser.ParseComments | parser.SkipObjectResolution
			file, err := parser.ParseFile(set, path, src, mode)
			if err != nil {
				return nil, nil, nil, err
			}
			if ast.IsGenerated(file) {
				continue
			}
			reason = reasons(set, file)
			if !isTest(path) {
				functions = append(functions, functionsOf(set, file, path)...)
			}
		}
		wide = append(wide, tooWide(path, lines, reason)...)
		if !isTest(path) {
			files = append(files, sized{len(lines), path})
		}
	}
	return functions, files, wide, nil
}

func isTest(path string) bool { return strings.HasSuffix(path, "_test.go") }

func functionsOf(set *token.FileSet, file *ast.File, path string) []sized {
	var all []sized
	line := func(p token.Pos) int { return set.Position(p).Line }
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok {
			name := fmt.Sprintf("%s:%d %s", path, line(f.Pos()), f.Name.Name)
			all = append(all, sized{line(f.End()) - line(f.Pos()) + 1, name})
		}
	}
	return all
}

func show(kind string, all []sized) {
	slices.SortStableFunc(all, func(a, b sized) int { return cmp.Compare(b.lines, a.lines) })
	fmt.Printf("longest %s:\n", kind)
	for _, s := range all[:min(shown, len(all))] {
		fmt.Printf("%6d  %s\n", s.lines, s.name)
	}
}
