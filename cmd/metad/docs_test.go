package main

import (
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// repository is the root of the source tree.
const repository = "../.."

// sources calls f with every file of the tree that has one of the endings.
func sources(t *testing.T, f func(path, text string), endings ...string) {
	t.Helper()
	err := filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && path != repository &&
			(name[0] == '.' || name == "bin" || name == "testdata") {
			return fs.SkipDir
		}
		for _, ending := range endings {
			if !d.IsDir() && strings.HasSuffix(path, ending) {
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				f(path, string(b))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

var (
	fence   = regexp.MustCompile("(?ms)^```.*?^```$")
	quoted  = regexp.MustCompile("`[^`\n]*`")
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.+?) *$`)
)

// anchors returns the anchors of a page, as GitHub makes them of its headings.
func anchors(page string) map[string]bool {
	all := map[string]bool{}
	for _, h := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		var slug strings.Builder
		for _, r := range strings.ToLower(link.ReplaceAllString(h[1], "]")) {
			switch {
			case r == ' ':
				slug.WriteByte('-')
			case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == '_':
				slug.WriteRune(r)
			}
		}
		name := slug.String()
		for n := 1; all[name]; n++ {
			name = fmt.Sprintf("%s-%d", slug.String(), n)
		}
		all[name] = true
	}
	return all
}

// deadLink returns why target, a link of the page at path, leads nowhere; "" if it does not.
func deadLink(path, target string) string {
	u, err := url.Parse(target)
	if err != nil {
		return err.Error()
	}
	if u.Scheme != "" {
		return ""
	}
	file := path
	if u.Path != "" {
		file = filepath.Join(filepath.Dir(path), u.Path)
	}
	if _, err := os.Stat(file); err != nil {
		return "no such file"
	}
	if u.Fragment == "" {
		return ""
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	if !anchors(string(b))[u.Fragment] {
		return "no such heading"
	}
	return ""
}

// Every link from a page to a page of the tree leads there, and so does every path of a page in the
// code, the log lines and the rules.
func TestDocsLinks(t *testing.T) {
	links := 0
	sources(t, func(path, text string) {
		text = quoted.ReplaceAllString(fence.ReplaceAllString(text, ""), "")
		for _, l := range link.FindAllStringSubmatch(text, -1) {
			links++
			if why := deadLink(path, l[1]); why != "" {
				t.Errorf("%s: %s: %s", path, l[1], why)
			}
		}
	}, ".md")
	if links < 50 {
		t.Errorf("found %d links only", links)
	}
	named := regexp.MustCompile(`\bdocs/[a-zA-Z0-9_/-]+\.md(#[a-z0-9-]+)?`)
	sources(t, func(path, text string) {
		for _, name := range named.FindAllString(text, -1) {
			if why := deadLink(repository+"/page", name); why != "" {
				t.Errorf("%s: %s: %s", path, name, why)
			}
		}
	}, ".go", ".yml", ".yaml", ".h", ".c", ".service", ".sh", ".json", "Makefile")
}

// A link is dead if its file or its heading is not there.
func TestDeadLink(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	text := "# A `code` & more\n```\n# not one\n```\n## Twice\n## Twice\n"
	if err := os.WriteFile(page, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]string{"https://x.invalid/": "", "page.md": "",
		"#a-code--more": "", "page.md#twice": "", "#twice-1": "", ".": "",
		"#not-one": "no such heading", "other.md": "no such file", "#twice-2": "no such heading"} {
		if got := deadLink(page, target); got != want {
			t.Errorf("%s: got %q, want %q", target, got, want)
		}
	}
}
