// Command longest prints the ten longest functions and the ten longest files among the Go files
// that it is given. Tests and generated files do not count.
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
	functions, files, err := measure(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "longest:", err)
		os.Exit(1)
	}
	show("functions", functions)
	show("files", files)
}

// measure returns the lengths, in lines, of the functions and of the files at paths.
func measure(paths []string) (functions, files []sized, err error) {
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil,
			parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, nil, err
		}
		if ast.IsGenerated(file) {
			continue
		}
		line := func(p token.Pos) int { return set.Position(p).Line }
		files = append(files, sized{line(file.FileEnd), path})
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok {
				name := fmt.Sprintf("%s:%d %s", path, line(f.Pos()), f.Name.Name)
				functions = append(functions,
					sized{line(f.End()) - line(f.Pos()) + 1, name})
			}
		}
	}
	return functions, files, nil
}

func show(kind string, all []sized) {
	slices.SortStableFunc(all, func(a, b sized) int { return cmp.Compare(b.lines, a.lines) })
	fmt.Printf("longest %s:\n", kind)
	for _, s := range all[:min(shown, len(all))] {
		fmt.Printf("%6d  %s\n", s.lines, s.name)
	}
}
