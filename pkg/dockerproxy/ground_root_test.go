//go:build root

package dockerproxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"metad/internal/expect"
	"metad/internal/testdocker"
	"metad/pkg/docker"
	"metad/pkg/inject"
	"metad/pkg/mdfile"
	"metad/pkg/task"
)

func TestMain(m *testing.M) { os.Exit(testdocker.Main(m)) }

// patience bounds every wait for a condition.
const patience = 30 * time.Second

// rootGround is a proxy in front of a real Engine, with the follower that keeps the files current.
type rootGround struct {
	*testdocker.Host
	t       testing.TB
	dataDir string
	socket  string
	files   *mdfile.Writer
	proxy   *Proxy
	logs    *observer.ObservedLogs
	stop    func()

	mu      sync.Mutex
	applied []*task.Task // the follower's last set
}

type options struct {
	disabled bool
	uris     bool
	form     mdfile.Form
	dataDir  string // "": a new one
}

func newRootGround(t testing.TB, o options) *rootGround {
	t.Helper()
	g := &rootGround{Host: testdocker.Shared(t), t: t, dataDir: o.dataDir}
	dir, err := os.MkdirTemp("", "metad-proxy-") // a socket's path may not be long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if g.dataDir == "" {
		g.dataDir = filepath.Join(dir, "data")
	}
	g.socket = filepath.Join(dir, "docker.sock")
	var core zapcore.Core
	core, g.logs = observer.New(zap.DebugLevel)
	log := zap.New(core)
	if g.files, err = mdfile.NewWriter(mdfile.Config{Layout: mdfile.Layout{DataDir: g.dataDir,
		Form: o.form}}, log); err != nil {
		t.Fatal(err)
	}
	g.files.SetHost(mdfile.Host{PrivateIPv4Address: "10.0.0.1"})
	follower, err := docker.New(docker.Config{Engine: g.Client, HostNetns: g.NSPath(), Log: log,
		Apply: func(tasks []*task.Task) {
			g.mu.Lock()
			g.applied = tasks
			g.mu.Unlock()
			g.files.Apply(tasks)
		}})
	if err != nil {
		t.Fatal(err)
	}
	if g.proxy, err = New(Config{Engine: g.Socket},
		inject.New(inject.Config{File: !o.disabled, URIs: o.uris,
			Identify: follower.Identify}, g.files), g.files, log); err != nil {
		t.Fatal(err)
	}
	g.proxy.tick = make(chan time.Time)
	l, err := Listen(g.socket, g.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served, followed := make(chan error, 1), make(chan error, 1)
	go func() { served <- g.proxy.Serve(ctx, l) }()
	go func() { followed <- follower.Run(ctx) }()
	stopped := false
	g.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := errors.Join(<-served, <-followed, follower.Close(),
			g.files.Close()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(g.stop)
	select {
	case <-follower.Synced():
	case <-time.After(patience):
		t.Fatal("the follower says nothing")
	}
	return g
}

// command returns the docker command, which talks to the proxy.
func (g *rootGround) command(args ...string) *exec.Cmd {
	cmd := g.CLICommand(args...)
	cmd.Env = append(cmd.Env, "DOCKER_HOST=unix://"+g.socket)
	return cmd
}

// docker runs the docker command through the proxy; an exit code other than 0 fails the test.
func (g *rootGround) docker(args ...string) string {
	g.t.Helper()
	var stderr bytes.Buffer
	cmd := g.command(args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		g.t.Fatalf("docker %s: %v: %s%s", strings.Join(args, " "), err, out, &stderr)
	}
	return strings.TrimSpace(string(out))
}

// start runs a sleeping container through the proxy and returns its id. It is removed with the
// test.
func (g *rootGround) start(args ...string) (id string) {
	g.t.Helper()
	args = append(append([]string{"run", "-d", "--stop-signal", "KILL"}, args...),
		testdocker.BusyboxImage)
	id = g.docker(args...)
	g.t.Cleanup(func() { _, _ = g.CLICommand("rm", "-f", id).CombinedOutput() })
	return id
}

// client returns an Engine client that talks to the proxy.
func (g *rootGround) client() *client.Client {
	g.t.Helper()
	c, err := client.NewClientWithOpts(client.WithHost("unix://"+g.socket),
		client.WithAPIVersionNegotiation())
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// dir returns the directory on the host of the container with the id, from its mounts.
func (g *rootGround) dir(id string) string {
	g.t.Helper()
	for _, m := range g.Inspect(g.t, id).Mounts {
		if strings.HasPrefix(m.Source, g.dataDir+"/metadata/") {
			return m.Source
		}
	}
	g.t.Fatalf("container %s has no mount of ours", id)
	return ""
}

// until waits until the document in dir satisfies ok and returns it.
func (g *rootGround) until(what, dir string, ok func(mdfile.Document) bool) (d mdfile.Document) {
	g.t.Helper()
	g.wait(what, func() bool {
		b, err := os.ReadFile(filepath.Join(dir, mdfile.FileName))
		d = mdfile.Document{}
		return err == nil && json.Unmarshal(b, &d) == nil && ok(d)
	})
	return d
}

func ready(d mdfile.Document) bool { return d.MetadataFileStatus == mdfile.StatusReady }

// wait waits until ok.
func (g *rootGround) wait(what string, ok func() bool) {
	g.t.Helper()
	expect.Until(g.t, what, ok, func() any { return g.logs.All() })
}

// empty waits until nothing is left of the directories.
func (g *rootGround) empty() {
	g.t.Helper()
	g.wait("no directory left", func() bool {
		list, err := os.ReadDir(filepath.Join(g.dataDir, "metadata"))
		return len(list) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist))
	})
}

func (g *rootGround) warnings() (n int) {
	return g.logs.FilterMessage("container is created without its metadata file").Len()
}

// reapply has the files made again of the follower's last set.
func (g *rootGround) reapply() {
	g.mu.Lock()
	tasks := g.applied
	g.mu.Unlock()
	g.files.Apply(tasks)
}
