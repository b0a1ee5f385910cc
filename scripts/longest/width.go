package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"strings"
	"unicode/utf8"
)

const (
	columns  = 100 // the widest line
	tabWidth = 8
)

// tooWide returns the lines over 100 columns that have no reason, as "path:line". A text without a
// space, such as a URL, and a directive for a tool are reasons of their own.
func tooWide(path string, lines []string, reason map[int]bool) []string {
	var wide []string
	for i, line := range lines {
		width := utf8.RuneCountInString(line) + (tabWidth-1)*strings.Count(line, "\t")
		if width <= columns || reason[i+1] || strings.HasPrefix(line, "//go:") {
			continue
		}
		if !unbroken(line) {
			wide = append(wide, fmt.Sprintf("%s:%d", path, i+1))
		}
	}
	return wide
}

// unbroken reports whether one word of the line is so long that no break helps.
func unbroken(line string) bool {
	for _, word := range strings.Fields(line) {
		if utf8.RuneCountInString(word) > columns*2/3 {
			return true
		}
	}
	return false
}

// reasons returns the lines of file that may be wider: those within a raw string, whose breaks are
// part of it, and in a test the rows of a table. A row is an element of a literal or a call of a
// function by its bare name that begins its line and ends on it.
func reasons(set *token.FileSet, file *ast.File) map[int]bool {
	lines := map[int]bool{}
	test := isTest(set.Position(file.Pos()).Filename)
	begins := map[int]int{} // the column of the first node on each line
	row := func(n ast.Node) {
		begin, end := set.Position(n.Pos()), set.Position(n.End())
		if test && begin.Line == end.Line && begins[begin.Line] == begin.Column {
			lines[begin.Line] = true
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if n == nil {
			return false
		}
		begin := set.Position(n.Pos())
		if _, ok := begins[begin.Line]; !ok {
			begins[begin.Line] = begin.Column
		}
		switch n := n.(type) {
		case *ast.BasicLit:
			for l := begin.Line; n.Value[0] == '`' &&
				l <= set.Position(n.End()).Line; l++ {
				lines[l] = true
			}
		case *ast.CompositeLit:
			for _, e := range n.Elts {
				if p := set.Position(e.Pos()); begins[p.Line] == 0 {
					begins[p.Line] = p.Column
				}
				row(e)
			}
		case *ast.ExprStmt:
			if call, ok := n.X.(*ast.CallExpr); ok {
				if _, ok := call.Fun.(*ast.Ident); ok {
					row(n)
				}
			}
		}
		return true
	})
	return lines
}
