package mdfile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/internal/expect"
	"metad/pkg/task"
)

// ground is a Writer on a data directory of its own.
type ground struct {
	*Writer
	t       *testing.T
	dataDir string
	logs    *observer.ObservedLogs
	clock   *atomic.Int64 // Unix seconds
}

func newGround(t *testing.T) *ground {
	clock := new(atomic.Int64)
	clock.Store(testTime.Unix())
	return openGround(t, t.TempDir(), clock)
}

func openGround(t *testing.T, dataDir string, clock *atomic.Int64) *ground {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	w, err := NewWriter(Config{DataDir: dataDir}, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	w.now = func() time.Time { return time.Unix(clock.Load(), 0) }
	w.InDoubt() // opens the directory
	return &ground{w, t, dataDir, logs, clock}
}

// restart returns a Writer on the same directory, as a new metad has it.
func (g *ground) restart() *ground {
	g.t.Helper()
	g.Close()
	return openGround(g.t, g.dataDir, g.clock)
}

// reserve fails the test on an error.
func (g *ground) reserve(t *task.Task, name string) *Entry {
	g.t.Helper()
	e, err := g.Reserve(t, &task.Container{Name: name, DockerName: name, Image: "i",
		State: "created"}, g.Layout().Form, newToken())
	if err != nil {
		g.t.Fatal(err)
	}
	return e
}

// tree lists what is below the data directory, directories with a slash.
func (g *ground) tree() string {
	g.t.Helper()
	var names []string
	root := filepath.Join(g.dataDir, "metadata")
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel, _ := filepath.Rel(root, p); rel != "." {
			if d.IsDir() {
				rel += "/"
			}
			names = append(names, rel)
		}
		return nil
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return strings.Join(names, " ")
}

func (g *ground) read(rel string) Document {
	g.t.Helper()
	var d Document
	b, err := os.ReadFile(filepath.Join(g.dataDir, "metadata", rel, AgentFileName))
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return d
}

const appDir = "default/158d1c8083dd49d6b527399fd6414f5c/app"

// Proposal 001: file before the container, basics after its creation, network facts after its
// start, rewritten when something changes, removed with the container.
func TestWriterLife(t *testing.T) {
	g := newGround(t)
	g.SetHost(testHost)
	e := g.reserve(testTask(), "app")
	if want := "/var/lib/ecs/data/metadata/" + appDir; e.HostDir != want {
		t.Errorf("HostDir: got %s, want %s", e.HostDir, want)
	}
	if e.ContainerDir != "/ecs/metadata/app" || e.File != "/ecs/metadata/app/metadata.json" {
		t.Errorf("in the container: got %s, %s", e.ContainerDir, e.File)
	}
	// F04
	if d := g.read(appDir); d.Status != "created" || d.ContainerID != "" ||
		d.MetadataFileStatus != "" {
		t.Errorf("first version: got %+v", d)
	}

	if err := e.Created(testID); err != nil {
		t.Fatal(err)
	}
	if d := g.read(appDir); d.ContainerID != testID || d.DockerContainerName != "/app" ||
		d.MetadataFileStatus != "" {
		t.Errorf("after creation: got %+v", d)
	}

	g.Apply(nil) // a set from before the creation takes nothing away
	c := runningContainer()
	g.Apply([]*task.Task{testTask(c)})
	d := g.read(appDir)
	if d.MetadataFileStatus != "READY" || d.IPAddress != "172.17.0.2" { // F05
		t.Errorf("after start: got %+v", d)
	}
	if d.LastUpdatedAt != fmt.Sprint(testTime.Unix()) {
		t.Errorf("LastUpdatedAt: got %s", d.LastUpdatedAt)
	}

	// The time alone is no reason to write.
	g.clock.Add(100)
	same := *c
	g.Apply([]*task.Task{testTask(&same)})
	if got := g.read(appDir).LastUpdatedAt; got != d.LastUpdatedAt {
		t.Errorf("LastUpdatedAt without a change: got %s, want %s", got, d.LastUpdatedAt)
	}
	moved := *c
	moved.DockerNetworks = []task.DockerNetwork{{Name: "bridge", IPAddress: "172.17.0.9"}}
	moved.DockerName = "renamed"
	g.Apply([]*task.Task{testTask(&moved)})
	if d := g.read(appDir); d.IPAddress != "172.17.0.9" ||
		d.DockerContainerName != "/renamed" ||
		d.LastUpdatedAt == fmt.Sprint(testTime.Unix()) {
		t.Errorf("after a change: got %+v", d)
	}
	stopped := *c
	stopped.State, stopped.PID = "exited", 0
	g.Apply([]*task.Task{testTask(&stopped)})
	if d := g.read(appDir); d.Status != "exited" || d.MetadataFileStatus != "" ||
		d.IPAddress != "" {
		t.Errorf("after the stop: got %+v", d)
	}

	g.Apply(nil) // F16
	if got := g.tree(); got != "" {
		t.Errorf("after removal: got %s", got)
	}
}

// F12: a container that exits before anybody looked keeps a file that is not READY.
func TestWriterF12ExitedAtOnce(t *testing.T) {
	g := newGround(t)
	e := g.reserve(testTask(), "app")
	if err := e.Created(testID); err != nil {
		t.Fatal(err)
	}
	c := runningContainer()
	c.State, c.PID = "exited", 0
	g.Apply([]*task.Task{testTask(c)})
	if d := g.read(appDir); d.MetadataFileStatus != "" || d.Status != "exited" {
		t.Errorf("got %+v", d)
	}
	if n := g.logs.Len(); n != 0 {
		t.Errorf("got %v", g.logs.All())
	}
}

// Proposal 001, the diagram: one directory per container, beneath that of its task, which goes with
// its last container.
func TestWriterDirectories(t *testing.T) {
	g := newGround(t)
	one, two := testTask(), &task.Task{ARN: "arn:aws:ecs:us-west-2:1:task/9f2e"}
	c := func(id, name string) *task.Container {
		return &task.Container{ID: id, Name: name, State: "created"}
	}
	for _, r := range []struct {
		t    *task.Task
		c, n string
	}{{one, "id1", "c1"}, {one, "id2", "c2"}, {two, "id3", "c3"}} {
		if err := g.reserve(r.t, r.n).Created(r.c); err != nil {
			t.Fatal(err)
		}
	}
	want := func(tasks []*task.Task, want string) {
		t.Helper()
		g.Apply(tasks)
		var dirs []string
		for _, n := range strings.Fields(g.tree()) {
			if strings.HasSuffix(n, "/") {
				dirs = append(dirs, strings.Replace(n,
					"158d1c8083dd49d6b527399fd6414f5c", "158d", 1))
			}
		}
		if got := strings.Join(dirs, " "); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	t2 := &task.Task{ARN: two.ARN, Containers: []*task.Container{c("id3", "c3")}}
	want([]*task.Task{testTask(c("id1", "c1"), c("id2", "c2")), t2}, "9f2e/ 9f2e/c3/ default/ default/158d/ default/158d/c1/ default/158d/c2/") // F13
	want([]*task.Task{testTask(c("id2", "c2")), t2}, "9f2e/ 9f2e/c3/ default/ default/158d/ default/158d/c2/")
	want([]*task.Task{t2}, "9f2e/ 9f2e/c3/")
	want(nil, "")
}

// A container without a task known beforehand gets a directory that no other has; one without a
// name a path that no other has.
func TestWriterSingle(t *testing.T) {
	g := newGround(t)
	a, b := g.reserve(&task.Task{}, ""),
		g.reserve(&task.Task{Cluster: "arn:aws:ecs:x:1:cluster/blue"}, "")
	if a.HostDir == b.HostDir || a.File == b.File {
		t.Errorf("got %s and %s, %s and %s", a.HostDir, b.HostDir, a.File, b.File)
	}
	if !strings.HasPrefix(a.HostDir, "/var/lib/ecs/data/metadata/default/") ||
		!strings.HasPrefix(b.HostDir, "/var/lib/ecs/data/metadata/blue/") {
		t.Errorf("got %s and %s", a.HostDir, b.HostDir)
	}
}

// A restart brings files up to date (F17), removes what containers left that went meanwhile, and
// keeps what is not ours: the ECS agent's own directories and foreign files.
func TestWriterRestart(t *testing.T) {
	g := newGround(t)
	root := filepath.Join(g.dataDir, "metadata")
	if err := g.reserve(testTask(), "app").Created(testID); err != nil {
		t.Fatal(err)
	}
	if err := g.reserve(testTask(), "gone").Created("gone"); err != nil {
		t.Fatal(err)
	}
	agents := filepath.Join(root, "default", "agents-task", "app")
	if err := os.MkdirAll(agents, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(agents, AgentFileName), []byte("{}"),
		0o644); err != nil {
		t.Fatal(err)
	}
	half, writing := filepath.Join(root, appDir, tmpPrefix+"123"),
		filepath.Join(root, filepath.Dir(appDir), "gone", tmpPrefix+"456")
	old := time.Now().Add(-2 * grace)
	if err := errors.Join(os.WriteFile(half, []byte("{"), 0o644), os.Chtimes(half, old, old),
		os.WriteFile(writing, []byte("{"), 0o644)); err != nil {
		t.Fatal(err)
	}

	g.clock.Store(time.Now().Unix() + 61)
	g = g.restart()
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a file is still there: %v", err)
	}
	if _, err := os.Stat(writing); err != nil {
		t.Errorf("a file that another metad may be writing: %v", err)
	}
	g.Apply([]*task.Task{testTask(runningContainer())})
	if d := g.read(appDir); d.MetadataFileStatus != StatusReady {
		t.Errorf("got %+v", d)
	}
	// Not in the first set: perhaps the Engine is slow. Not in the Engine's list: gone.
	g.Sweep(g.now(), []Mounted{{ID: testID}, {ID: "gone"}})
	if !strings.Contains(g.tree(), "/gone/") {
		t.Error("removed although the Engine has it")
	}
	g.Sweep(g.now(), []Mounted{{ID: testID}})
	want := strings.ReplaceAll(
		"default/ default/T/ default/T/app/ default/T/app/ecs-container-metadata.json "+
			"default/T/app/metadata.json", "T", "158d1c8083dd49d6b527399fd6414f5c") +
		" default/agents-task/ default/agents-task/app/ " +
		"default/agents-task/app/ecs-container-metadata.json"
	if got := g.tree(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	// Nothing changed: nothing is written.
	before := g.read(appDir).LastUpdatedAt
	g.clock.Add(100)
	g = g.restart()
	g.Apply([]*task.Task{testTask(runningContainer())})
	if got := g.read(appDir).LastUpdatedAt; got != before {
		t.Errorf("LastUpdatedAt after a restart: got %s, want %s", got, before)
	}
}

// metad dies between the directory and the container, at each step of making it: the next one
// removes what is left, but not before another metad could have said more.
func TestWriterOrphan(t *testing.T) {
	for _, step := range []string{"mkdir", "link", "file"} {
		t.Run(step, func(t *testing.T) {
			g := newGround(t)
			g.reserve(testTask(), "app")
			dir := filepath.Join(g.dataDir, "metadata", appDir)
			if step != "file" {
				_ = os.Remove(filepath.Join(dir, FileName))
			}
			if step == "mkdir" {
				_ = os.Remove(filepath.Join(dir, AgentFileName))
			}
			g.clock.Store(time.Now().Unix())
			g = g.restart()
			g.Apply(nil)
			g.Sweep(g.now(), nil)
			if g.tree() == "" {
				t.Error("removed at once")
			}
			g.clock.Add(61)
			g.Sweep(g.now(), nil)
			if got := g.tree(); got != "" {
				t.Errorf("left behind: %s", got)
			}
		})
	}
}

// metad dies between the container and the note of its id, or a second metad has made the
// directory: the mount says whose it is. With --volumes-from two mount it; the older one is it.
func TestWriterAdopts(t *testing.T) {
	g := newGround(t)
	g.reserve(testTask(), "app")
	volumes := []task.Volume{{Source: "/var/lib/ecs/data/metadata/" + appDir,
		Destination: "/ecs/metadata/app"}}
	c := runningContainer()
	c.Volumes, c.CreatedAt = volumes, testTime
	other := runningContainer()
	other.ID, other.Volumes, other.CreatedAt = "other", volumes, testTime.Add(time.Second)
	g = g.restart()
	second := openGround(t, g.dataDir, g.clock)
	e := g.reserve(&task.Task{}, "late") // not seen when second looked around
	if err := e.Created("late"); err != nil {
		t.Fatal(err)
	}
	late := &task.Container{ID: "late", State: "running", PID: 3,
		Volumes: []task.Volume{{Source: e.HostDir}}}
	third := *other
	third.ID = "third"
	tasks := []*task.Task{{Containers: []*task.Container{other}}, testTask(c),
		{Containers: []*task.Container{&third, late}}}
	second.Apply(tasks)
	if d := second.read(appDir); d.ContainerID != testID {
		t.Errorf("got %s", d.ContainerID)
	}
	rel := strings.TrimPrefix(e.HostDir, "/var/lib/ecs/data/metadata/")
	if d := second.read(rel); d.MetadataFileStatus != StatusReady {
		t.Errorf("got %+v", d)
	}
	second.Apply(nil)
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// Nobody knows what became of a create request: the directory stays while it may still be needed.
func TestWriterUnsure(t *testing.T) {
	g := newGround(t)
	e := g.reserve(testTask(), "app")
	g.clock.Add(1000) // a slow Engine
	g.Apply(nil)
	g.Sweep(g.now(), nil)
	if g.tree() == "" || g.InDoubt() {
		t.Error("removed while the Engine was still at it")
	}
	e.Unsure()
	g.Sweep(g.now(), nil)
	if g.tree() == "" || g.InDoubt() {
		t.Error("removed at once")
	}
	asked := g.now()
	g.clock.Add(61)
	g.Sweep(asked, nil)
	if g.tree() == "" || !g.InDoubt() {
		t.Error("removed on an answer from before")
	}
	g.Sweep(g.now(), []Mounted{{ID: "x", Sources: []string{e.HostDir}}})
	if g.tree() == "" {
		t.Error("removed although it is mounted")
	}
	g.Sweep(g.now(), []Mounted{{ID: "y", Sources: []string{"/srv"}}})
	if got := g.tree(); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// Facts about the host that come late reach all files.
func TestWriterSetHost(t *testing.T) {
	g := newGround(t)
	if err := g.reserve(testTask(), "app").Created(testID); err != nil {
		t.Fatal(err)
	}
	tasks := []*task.Task{testTask(runningContainer())}
	g.Apply(tasks)
	g.SetHost(testHost)
	g.Apply(tasks)
	if d := g.read(appDir); d.ContainerInstanceARN != testHost.ContainerInstanceARN ||
		d.ContainerInstance != d.ContainerInstanceARN {
		t.Errorf("got %+v", d)
	}
}

func TestConfig(t *testing.T) {
	f := func(c Config, field string) {
		t.Helper()
		_, err := NewWriter(c, zap.NewNop())
		expect.Field(t, err, field)
	}
	f(Config{}, "")
	f(Config{DataDir: "/data", Layout: Layout{DataDir: "/var/lib/ecs/data"}}, "")
	f(Config{DataDir: "data"}, "DataDir")
	f(Config{Layout: Layout{DataDir: "data"}}, "Layout.DataDir")
	f(Config{Layout: Layout{DataDir: "/a:b"}}, "Layout.DataDir")
}

// The Engine shows the directory without what is superfluous in its path, and mounts are compared
// with it.
func TestWriterCleansDataDir(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWriter(Config{Layout: Layout{DataDir: dir + "//data/./"}}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if got, want := w.Layout().Root(), dir+"/data/metadata"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWaitFile(t *testing.T) {
	g := newGround(t)
	if err := g.reserve(testTask(), "app").Created(testID); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(g.dataDir, "metadata", appDir, FileName)

	short, cancel := context.WithTimeout(context.Background(), 3*waitInterval)
	defer cancel()
	if err := WaitFile(short, file); !errors.Is(err, ErrNotReady) ||
		!errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not READY: got %v", err)
	}
	if err := WaitFile(short, filepath.Join(g.dataDir, "none")); !errors.Is(err,
		fs.ErrNotExist) {
		t.Errorf("no file: got %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := WaitFile(ctx, ""); err == nil || ctx.Err() != nil {
		t.Errorf("no path: got %v", err)
	}
	if err := WaitFile(ctx, g.dataDir); err == nil || ctx.Err() != nil {
		t.Errorf("directory: got %v", err)
	}
	waited := make(chan error)
	go func() { waited <- WaitFile(ctx, file) }()
	g.Apply([]*task.Task{testTask(runningContainer())})
	if err := <-waited; err != nil {
		t.Errorf("READY: got %v", err)
	}
}

// The directory is not touched before it is needed: a start does not wait for a dead disk. The log
// says once that it cannot be used.
func TestWriterOpensTheDirectoryLate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	core, logs := observer.New(zap.InfoLevel)
	w, err := NewWriter(Config{DataDir: dir}, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after NewWriter: got %v, want no directory", err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil { // in its place
		t.Fatal(err)
	}
	w.Apply(nil)
	w.Apply(nil)
	if n := logs.FilterMessage("metadata directory not usable yet").Len(); n != 1 {
		t.Errorf("got %d lines, want 1: %v", n, logs.All())
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	w.Apply(nil)
	if _, err := os.Stat(filepath.Join(dir, "metadata")); err != nil {
		t.Errorf("when it can be made: %v", err)
	}
}
