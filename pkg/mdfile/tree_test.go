package mdfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"metad/pkg/task"
)

// F07, and a directory that every user can enter, whatever the umask.
func TestWriterModes(t *testing.T) {
	g := newGround(t)
	g.reserve(testTask(), "app")
	for name, want := range map[string]fs.FileMode{"": 0o755 | fs.ModeDir, FileName: 0o644,
		AgentFileName: 0o644} {
		info, err := os.Stat(filepath.Join(g.dataDir, "metadata", appDir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s: got %v, want %v", name, info.Mode(), want)
		}
	}
}

// Two containers of one name at a time each have a directory; the name in the container is the
// same.
func TestWriterDuplicateName(t *testing.T) {
	g := newGround(t)
	a, b := g.reserve(testTask(), "app"), g.reserve(testTask(), "app")
	if b.HostDir != a.HostDir+"-2" || b.File != a.File {
		t.Errorf("got %s for %s, and %s for %s", a.HostDir, a.File, b.HostDir, b.File)
	}
	a.Abandon()
	b.Abandon()
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// Names that are no good are refused, and nothing is left or touched outside.
func TestWriterBadNames(t *testing.T) {
	g := newGround(t)
	for _, name := range []string{"..", "a/b", "../../x", "größe", strings.Repeat("n", 300),
		"a:b", "a\x00"} {
		if _, err := g.Reserve(testTask(), &task.Container{Name: name}, FormProposal,
			newToken()); !errors.Is(err, ErrName) {
			t.Errorf("%.20q: got %v", name, err)
		}
	}
	for _, arn := range []string{"arn:aws:ecs:x:1:task/../../etc", "arn:aws:ecs:x:1:task/a/..",
		"x", "arn:aws:ecs:x:1:task/" + strings.Repeat("n", 300)} {
		// F14
		if _, err := g.Reserve(&task.Task{ARN: arn}, &task.Container{Name: "app"},
			FormProposal, newToken()); !errors.Is(err, ErrTaskARN) {
			t.Errorf("%.40q: got %v", arn, err)
		}
	}
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// A link planted in the tree is not followed out of it.
func TestWriterPlantedLink(t *testing.T) {
	g := newGround(t)
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(g.dataDir, "metadata", "default")); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Reserve(testTask(), &task.Container{Name: "app"}, FormProposal,
		newToken()); err == nil {
		t.Error("no error")
	}
	if list, _ := os.ReadDir(outside); len(list) != 0 {
		t.Errorf("written outside: %v", list)
	}
}

// A directory that somebody removed comes back with the next change.
func TestWriterRemovedByHand(t *testing.T) {
	g := newGround(t)
	if err := g.reserve(testTask(), "app").Created(testID); err != nil {
		t.Fatal(err)
	}
	c := runningContainer()
	g.Apply([]*task.Task{testTask(c)})
	if err := os.RemoveAll(filepath.Join(g.dataDir, "metadata", "default")); err != nil {
		t.Fatal(err)
	}
	c = runningContainer()
	c.DockerName = "renamed"
	g.Apply([]*task.Task{testTask(c)})
	if d := g.read(appDir); d.DockerContainerName != "/renamed" {
		t.Errorf("got %+v", d)
	}
}

// A file in the way of a write: one warning, the old text stays whole, and the write is made up
// for.
func TestWriterWriteFails(t *testing.T) {
	g := newGround(t)
	if err := g.reserve(testTask(), "app").Created(testID); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(g.dataDir, "metadata", appDir, FileName)
	if err := errors.Join(os.Remove(file), os.Mkdir(file, 0o755)); err != nil {
		t.Fatal(err)
	}
	tasks := []*task.Task{testTask(runningContainer())}
	g.Apply(tasks)
	g.Apply(tasks)
	if n := g.logs.FilterMessage("metadata file not written").Len(); n != 1 {
		t.Errorf("got %d warnings, want 1: %v", n, g.logs.All())
	}
	if strings.Contains(g.tree(), tmpPrefix) {
		t.Errorf("half a file is left: %s", g.tree())
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	g.Retry()
	if d := g.read(appDir); d.MetadataFileStatus != StatusReady {
		t.Errorf("got %+v", d)
	}
}

// F06: a reader never sees half a file or none, by either name, through 1,000 versions.
func TestWriterF06Reader(t *testing.T) {
	g := newGround(t)
	if err := g.reserve(testTask(), "app").Created(testID); err != nil {
		t.Fatal(err)
	}
	const versions = 1000
	var done atomic.Bool
	var readers sync.WaitGroup
	for _, name := range []string{FileName, AgentFileName} {
		readers.Add(1)
		go func() {
			defer readers.Done()
			file := filepath.Join(g.dataDir, "metadata", appDir, name)
			for n := 0; !done.Load() || n == 0; n++ {
				b, err := os.ReadFile(file)
				var d Document
				if err == nil {
					err = json.Unmarshal(b, &d)
				}
				if err != nil || d.ContainerID != testID {
					t.Errorf("read %d: %v: %s", n, err, b)
					return
				}
			}
		}()
	}
	for n := range versions {
		c := runningContainer()
		c.DockerName = strings.Repeat("x", n%200) + fmt.Sprint(n)
		g.Apply([]*task.Task{testTask(c)})
	}
	done.Store(true)
	readers.Wait()
	if d := g.read(appDir); !strings.HasSuffix(d.DockerContainerName, fmt.Sprint(versions-1)) {
		t.Errorf("got %s", d.DockerContainerName)
	}
}

// The directory is found by task id and name, also where the id was not known in time, the Engine
// chose the name, or it changes; and the link goes with the container.
func TestWriterAlias(t *testing.T) {
	g := newGround(t)
	if err := g.reserve(&task.Task{}, "").Created(testID); err != nil {
		t.Fatal(err)
	}
	c := runningContainer()
	apply := func(name string) {
		t.Helper()
		c := *c
		c.Name = name
		g.Apply([]*task.Task{testTask(&c)})
		dir := filepath.Dir(appDir)
		if list, err := os.ReadDir(filepath.Join(g.dataDir, "metadata", dir)); err != nil ||
			len(list) != 1 {
			t.Errorf("%s: got %v, %v", name, list, err)
		}
		if d := g.read(dir + "/" + name); d.ContainerName != name {
			t.Errorf("%s: got %+v", name, d)
		}
	}
	apply("lucid_turing")
	apply("web")
	g = g.restart()
	if d := g.read(filepath.Dir(appDir) + "/web"); d.ContainerID != testID {
		t.Errorf("after a restart: got %+v", d)
	}
	apply("web")
	apply("other")

	// Another container of the task has the name: it keeps it.
	if err := g.reserve(testTask(), "app").Created("app"); err != nil {
		t.Fatal(err)
	}
	c.Name = "app"
	g.Apply([]*task.Task{testTask(c, &task.Container{ID: "app", Name: "app"})})
	if d := g.read(appDir); d.ContainerID != "app" {
		t.Errorf("got %+v", d)
	}
	g.Apply([]*task.Task{testTask(c)})
	g.Apply(nil)
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}

	if err := g.reserve(&task.Task{}, "").Created(testID); err != nil {
		t.Fatal(err)
	}
	apply("web")
	g.Apply(nil)
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}

	// One that points nowhere goes at the start.
	stray := filepath.Join(g.dataDir, "metadata", "default", "t", "app")
	if err := errors.Join(os.MkdirAll(filepath.Dir(stray), 0o755),
		os.Symlink("../../default/none", stray)); err != nil {
		t.Fatal(err)
	}
	g = g.restart()
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}
}
