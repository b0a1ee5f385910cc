package server

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// The rows of docs/ecs-agent.md and the rows of this package are the same, in the same words, and
// each holds.
func TestConformance(t *testing.T) {
	page := pageRows(t)
	for _, r := range rows {
		says, known := page[r.id]
		if !known {
			t.Errorf("%s: not in docs/ecs-agent.md, or twice here", r.id)
		} else if says != r.says {
			t.Errorf("%s: docs/ecs-agent.md says %q, the test says %q", r.id, says,
				r.says)
		}
		delete(page, r.id)
		t.Run(r.id+" "+r.says, func(t *testing.T) {
			switch {
			case r.test != nil:
				r.test(t)
			case r.file != "":
				src, err := os.ReadFile(filepath.Join(root, r.file))
				if err != nil || !bytes.Contains(src, []byte(r.id)) {
					t.Errorf("not in %s (%v)", r.file, err)
				}
				t.Log("tested in " + r.file)
			case r.reason != "":
				t.Log("no test: " + r.reason)
			default:
				t.Error("no test, no file, no reason")
			}
		})
	}
	for id := range page {
		t.Errorf("%s: in docs/ecs-agent.md, without a row here", id)
	}
}

// An id of a row, wherever it stands in the repository, has a row in docs/ecs-agent.md.
func TestConformanceIDs(t *testing.T) {
	page := pageRows(t)
	id := regexp.MustCompile(`\b[MCESRHLWKVFNX][0-9]{2}\b`)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != root && (name[0] == '.' || name == "bin" ||
				name == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if !slices.Contains([]string{".go", ".md", ".c", ".sh"}, filepath.Ext(path)) {
			return nil
		}
		src, err := os.ReadFile(path)
		for _, found := range id.FindAllString(string(src), -1) {
			if _, known := page[found]; !known {
				t.Errorf("%s: %s has no row in docs/ecs-agent.md", path, found)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// pageRows returns the rows of docs/ecs-agent.md: id → what metad does.
func pageRows(t *testing.T) map[string]string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(root, "docs/ecs-agent.md"))
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{}
	line := regexp.MustCompile(`(?m)^\| ([A-Z][0-9]{2}) \| (.+?) \| (.*?) ?\| .+ \|$`)
	for _, cell := range line.FindAllStringSubmatch(string(page), -1) {
		says := cell[2]
		if cell[3] != "" {
			says = cell[3]
		}
		if _, twice := said[cell[1]]; twice {
			t.Errorf("%s: twice in docs/ecs-agent.md", cell[1])
		}
		said[cell[1]] = strings.ReplaceAll(says, "`", "")
	}
	return said
}
