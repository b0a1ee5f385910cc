package mdfile

import (
	"errors"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

func TestLayout(t *testing.T) {
	for _, c := range []struct {
		name                        string
		layout                      Layout
		hostDir, containerDir, file string
	}{
		{"proposal", Layout{Linux, FormProposal, "/var/lib/ecs/data"},
			"/var/lib/ecs/data/metadata/default/158d/app", "/ecs/metadata/app",
			"/ecs/metadata/app/metadata.json"},
		{"F02 agent", Layout{Linux, FormAgent, "/var/lib/ecs/data/"},
			"/var/lib/ecs/data/metadata/default/158d/app", "/opt/ecs/metadata/t0ken",
			"/opt/ecs/metadata/t0ken/ecs-container-metadata.json"},
		{"windows proposal", Layout{Windows, FormProposal,
			DefaultDataDir(Windows, `C:\ProgramData`)},
			`C:\ProgramData\Amazon\ECS\data\metadata\default\158d\app`,
			`C:\Amazon\ECS\metadata\app`, `C:\Amazon\ECS\metadata\app\metadata.json`},
		{"windows agent",
			Layout{Windows, FormAgent, DefaultDataDir(Windows, `C:\ProgramData`)},
			`C:\ProgramData\Amazon\ECS\data\metadata\default\158d\app`,
			`C:\ProgramData\Amazon\ECS\metadata\t0ken`,
			`C:\ProgramData\Amazon\ECS\metadata\t0ken\ecs-container-metadata.json`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.layout.HostDir("default/158d/app"); got != c.hostDir {
				t.Errorf("HostDir: got %s, want %s", got, c.hostDir)
			}
			dir := c.layout.ContainerDir("app", "t0ken")
			if dir != c.containerDir {
				t.Errorf("ContainerDir: got %s, want %s", dir, c.containerDir)
			}
			if got := c.layout.File(dir); got != c.file {
				t.Errorf("File: got %s, want %s", got, c.file)
			}
			if !strings.HasPrefix(dir, c.layout.Base()) {
				t.Errorf("%s is not beneath %s", dir, c.layout.Base())
			}
		})
	}
	if got := DefaultDataDir(Linux, ""); got != "/var/lib/ecs/data" {
		t.Errorf("DefaultDataDir: got %s", got)
	}
}

func TestParseForm(t *testing.T) {
	for s, want := range map[string]Form{"proposal": FormProposal, "agent": FormAgent} {
		if got, err := ParseForm(s); got != want || err != nil {
			t.Errorf("%s: got %v, %v", s, got, err)
		}
	}
	if _, err := ParseForm("uuid"); err == nil {
		t.Error("uuid: no error")
	}
}

func TestCheckName(t *testing.T) {
	f := func(name string, want bool) {
		t.Helper()
		err := CheckName(name)
		if (err == nil) != want || err != nil && !errors.Is(err, ErrName) {
			t.Errorf("%.40q: got %v, want ok %v", name, err, want)
		}
	}
	f("app", true)
	f("~internal~ecs~pause", true)
	f("web_1.2-x", true)
	f("..data", true)
	f(strings.Repeat("n", 255), true)
	f(strings.Repeat("n", 256), false)
	f(strings.Repeat("n", 300), false)
	f("", false)
	f(".", false)
	f("..", false)
	f("...", false) // Windows takes it for a parent
	f("a/b", false)
	f("../x", false)
	f(`a\b`, false)
	f("a:b", false)
	f("a b", false)
	f("a\x00b", false)
	f("a\nb", false)
	f("größe", false)
	f("名前", false)
}

// F13: a long ARN gives two levels. F14: a malformed one none.
func TestTaskDir(t *testing.T) {
	f := func(arn, want string) {
		t.Helper()
		got, err := TaskDir(arn)
		if got != want || (err == nil) != (want != "") || err != nil &&
			!errors.Is(err, ErrTaskARN) {
			t.Errorf("%s: got %q, %v, want %q", arn, got, err, want)
		}
	}
	const arn = "arn:aws:ecs:us-west-2:111122223333:"
	f(arn+"task/158d", "158d")
	f(arn+"task/default/158d", "default/158d")
	f(arn+"task/a/b/c", "")
	f(arn+"task/", "")
	f(arn+"task/../158d", "")
	f(arn+"task/default/..", "")
	f(arn+"task//158d", "")
	f(arn+"task:158d", "")
	f(arn+"service/default/158d", "")
	f("arn:aws:ecs:task/158d", "")
	f("158d", "")
	f("", "")
}

func FuzzPaths(f *testing.F) {
	for _, arn := range []string{"arn:aws:ecs:us-west-2:1:task/default/158d",
		"arn:aws:ecs:::task/../..", "arn:::::task/x", "…"} {
		f.Add(arn, "app")
	}
	f.Add("arn:aws:ecs:us-west-2:1:task/default/158d", "../../../etc")
	f.Add("arn:aws:ecs:us-west-2:1:task/default/158d", `..\x`)
	f.Fuzz(func(t *testing.T, arn, name string) {
		dir, err := TaskDir(arn)
		if err != nil || CheckName(name) != nil {
			return
		}
		rel := path.Join(dir, name)
		if !filepath.IsLocal(rel) || strings.Count(rel, "/") != strings.Count(dir, "/")+1 {
			t.Errorf("TaskDir(%q) and %q: %q leaves the root", arn, name, rel)
		}
		l := Layout{Linux, FormProposal, "/d"}
		if got := l.HostDir(rel); !strings.HasPrefix(got, "/d/metadata/") ||
			path.Clean(got) != got || strings.ContainsAny(got, ":\\") {
			t.Errorf("HostDir(%q) is %q", rel, got)
		}
		if got := l.ContainerDir(name, ""); path.Dir(got) != "/ecs/metadata" {
			t.Errorf("ContainerDir(%q) is %q", name, got)
		}
		w := Layout{Windows, FormProposal, `C:\d`}
		if got := w.HostDir(rel); strings.Count(got, `\`) != 2+strings.Count(rel, "/")+1 {
			t.Errorf("HostDir(%q) on Windows is %q", rel, got)
		}
	})
}
