package nri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"go.uber.org/zap/zaptest"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
	"metad/pkg/task"
)

// asGuard is set in a guard's environment to the time that it gives metad for an answer.
const asGuard = "METAD_TEST_GUARD"

func TestMain(m *testing.M) {
	if text := os.Getenv(asGuard); text != "" {
		limit, err := time.ParseDuration(text)
		if err == nil {
			err = guard(limit)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const testID = "ef3dabed9bef087ed147024a221d2d3a822e85d53c0ca4024d3d78e7913eeb64"

// ground is the Engine's side of NRI, which is the library that the Engine uses, and a plugin.
type ground struct {
	t        *testing.T
	socket   string
	fileTime time.Duration
	plugin   *Plugin
	engine   *adaptation.Adaptation
}

// newGround returns a ground whose plugin has the time for its answers and files that the test
// gives: a test of what is answered gives enough on a busy machine.
func newGround(t *testing.T, runtime string, cfg inject.Config, guardTime,
	fileTime time.Duration) *ground {
	t.Helper()
	t.Setenv(asGuard, guardTime.String())      // inherited by the guards
	dir, err := os.MkdirTemp("", "metad-nri-") // a socket's path may not be long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	g := &ground{t: t, socket: filepath.Join(dir, "nri.sock"), fileTime: fileTime}
	g.startEngine(runtime)
	g.plugin = g.startPlugin(cfg)
	return g
}

func (g *ground) startEngine(runtime string) {
	g.t.Helper()
	sync := func(ctx context.Context, call adaptation.SyncCB) error {
		_, err := call(ctx, nil, nil)
		return err
	}
	update := func(context.Context,
		[]*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
		return nil, nil
	}
	e, err := adaptation.New(runtime, "29.6", sync, update, adaptation.WithSocketPath(g.socket),
		adaptation.WithPluginPath(g.t.TempDir()))
	if err == nil {
		err = e.Start()
	}
	if err != nil {
		g.t.Fatal(err)
	}
	g.engine = e
	g.t.Cleanup(e.Stop)
}

func (g *ground) startPlugin(cfg inject.Config) *Plugin {
	g.t.Helper()
	w, err := mdfile.NewWriter(mdfile.Config{DataDir: g.t.TempDir(),
		Layout: mdfile.Layout{DataDir: "/data"}}, zaptest.NewLogger(g.t))
	if err != nil {
		g.t.Fatal(err)
	}
	i := inject.New(cfg, w)
	p := New(Config{Socket: g.socket, Guard: []string{"/proc/self/exe"},
		Log: zaptest.NewLogger(g.t)}, i)
	p.files = i.Within(g.fileTime)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = p.Run(ctx) })
	g.t.Cleanup(func() {
		cancel()
		running.Wait()
		w.Close()
	})
	return p
}

// create asks the plugins, as the Engine does at a creation, until one answers as wanted.
func (g *ground) until(what string, ok func(env, mounts []string) bool) {
	g.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if env, mounts := g.create(nil); ok(env, mounts) {
			return
		}
		if time.Now().After(end) {
			g.t.Fatalf("waited in vain for: %s", what)
		}
	}
}

func (g *ground) create(labels map[string]string, env ...string) (added, mounts []string) {
	g.t.Helper()
	resp, err := g.engine.CreateContainer(context.Background(),
		&adaptation.CreateContainerRequest{
			Pod: &adaptation.PodSandbox{Id: testID},
			Container: &adaptation.Container{Id: testID, Name: "/app", Labels: labels,
				Env: env},
		})
	if err != nil {
		g.t.Fatalf("the creation fails: %v", err)
	}
	for _, e := range resp.GetAdjust().GetEnv() {
		added = append(added, e.ToOCI())
	}
	for _, m := range resp.GetAdjust().GetMounts() {
		mounts = append(mounts, fmt.Sprint(m.Type, " ", m.Source, " ", m.Destination, " ",
			m.Options))
	}
	return added, mounts
}

func something(env, _ []string) bool { return len(env) > 0 }

// The Engine's side gets the variables and the mount of every container that is to have them.
func TestAdjust(t *testing.T) {
	g := newGround(t, "docker", inject.Config{File: true, URIs: true}, time.Minute, time.Minute)
	g.until("an answer", something)
	env, mounts := g.create(nil)
	if len(env) != 3 || !strings.HasPrefix(env[1],
		"ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/"+testID[:32]+"-") ||
		!strings.HasPrefix(env[2], "ECS_CONTAINER_METADATA_FILE=/.metad/") ||
		len(mounts) != 1 || !strings.HasPrefix(mounts[0], "bind /data/metadata/default/") {
		t.Errorf("got %q and %q", env, mounts)
	}
	if env, mounts := g.create(map[string]string{inject.LabelFile: "false",
		inject.LabelURIs: "false"}); env != nil || mounts != nil {
		t.Errorf("label false: got %q and %q", env, mounts)
	}
	if env, _ := g.create(nil, "ECS_CONTAINER_METADATA_URI=http://mine",
		"ECS_CONTAINER_METADATA_FILE=/mine"); env != nil {
		t.Errorf("the user's own: got %q", env)
	}
	old := g.plugin.inject.URIs(inject.Container{})
	if env, _ := g.create(map[string]string{inject.LabelFile: "false"},
		old...); len(env) != 2 || slices.Contains(old, env[0]) {
		t.Errorf("a copied configuration: got %q", env)
	}
}

// While one metad takes over from another the Engine asks both: one puts in, the creation does not
// fail.
func TestTwoPlugins(t *testing.T) {
	g := newGround(t, "docker", inject.Config{File: true, URIs: true}, time.Minute, time.Minute)
	other := g.startPlugin(inject.Config{File: true, URIs: true})
	for _, p := range []*Plugin{g.plugin, other} {
		select {
		case <-p.Ready():
		case <-time.After(20 * time.Second):
			t.Fatal("not connected")
		}
	}
	g.until("an answer", something)
	for range 50 {
		if env, mounts := g.create(nil); len(env) != 3 || len(mounts) != 1 {
			t.Fatalf("got %q and %q", env, mounts)
		}
	}
}

// A metad that hangs holds up one creation for less than the Engine's own two seconds, and no more
// than that one; when it goes on it is the plugin again.
func TestHung(t *testing.T) {
	hang := make(chan struct{})
	var hung bool
	var mu sync.Mutex
	g := newGround(t, "docker", inject.Config{URIs: true, Identify: func(map[string]string,
		string) (*task.Task, *task.Container) {
		mu.Lock()
		wait := hung
		mu.Unlock()
		if wait {
			<-hang
		}
		return nil, nil
	}}, answerTime, fileTime)
	g.until("an answer", something)
	mu.Lock()
	hung = true
	mu.Unlock()
	begin := time.Now()
	if env, _ := g.create(nil); env != nil {
		t.Errorf("got %q of a metad that hangs", env)
	}
	took := time.Since(begin)
	t.Logf("the creation took %v", took.Round(time.Millisecond))
	if took >= adaptation.DefaultPluginRequestTimeout {
		t.Errorf("the creation took %v: the Engine's time-out and not the guard's", took)
	}
	mu.Lock()
	hung = false
	mu.Unlock()
	close(hang)
	g.until("an answer again", something)
}

// A data directory that hangs costs its file, and the next container's without another wait. Here
// it is what comes before the directory that hangs.
func TestSlowFile(t *testing.T) {
	hang := make(chan struct{})
	var hung atomic.Bool
	identify := func(map[string]string, string) (*task.Task, *task.Container) {
		if hung.Load() {
			<-hang
		}
		return nil, nil
	}
	g := newGround(t, "docker", inject.Config{File: true, Identify: identify}, time.Minute,
		fileTime)
	g.until("a file", something)
	hung.Store(true)
	for range 3 {
		if env, mounts := g.create(nil); env != nil || mounts != nil {
			t.Errorf("got %q and %q of a data directory that hangs", env, mounts)
		}
	}
	if n := g.plugin.files.Late(); n != 1 || !g.plugin.Connected() {
		t.Errorf("%d creations waited, connected: %v; want 1, and still the plugin", n,
			g.plugin.Connected())
	}
	hung.Store(false)
	close(hang)
	g.until("a file again", something)
}

// The Engine's end and start: metad is its plugin again.
func TestReconnect(t *testing.T) {
	g := newGround(t, "docker", inject.Config{URIs: true}, time.Minute, time.Minute)
	g.until("an answer", something)
	g.engine.Stop()
	g.startEngine("docker")
	g.until("an answer of the new Engine", something)
}

// containerd's own NRI, which may be at the same place, is left alone.
func TestNotDocker(t *testing.T) {
	g := newGround(t, "containerd", inject.Config{URIs: true}, time.Minute, time.Minute)
	handler := &handler{plugin: g.plugin}
	if _, err := handler.Configure(context.Background(), "", "containerd", "2.1"); err == nil {
		t.Error("containerd: no error")
	}
	if env, _ := g.create(nil); env != nil {
		t.Errorf("got %q", env)
	}
	if g.plugin.Connected() {
		t.Error("connected to containerd")
	}
}

// The guard passes on what is answered, hangs up on whom does not answer, and ends with either
// side.
func TestRelay(t *testing.T) {
	f := func(limit time.Duration, talk func(engine, metad net.Conn), want error) {
		t.Helper()
		engine, engineEnd := pair(t)
		metad, metadEnd := pair(t)
		done := make(chan error, 1)
		go func() { done <- relay(engineEnd, metadEnd, limit) }()
		talk(engine, metad)
		select {
		case err := <-done:
			if !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the relay does not end")
		}
	}
	exchange := func(engine, metad net.Conn) {
		t.Helper()
		buf := make([]byte, 10)
		for range 3 {
			fmt.Fprint(engine, "ask")
			if n, err := metad.Read(buf); err != nil || string(buf[:n]) != "ask" {
				t.Fatalf("metad got %q, %v", buf[:n], err)
			}
			fmt.Fprint(metad, "answer")
			if n, err := engine.Read(buf); err != nil || string(buf[:n]) != "answer" {
				t.Fatalf("the engine got %q, %v", buf[:n], err)
			}
		}
	}
	f(time.Hour, func(engine, metad net.Conn) { exchange(engine, metad); engine.Close() }, nil)
	f(time.Hour, func(engine, metad net.Conn) { exchange(engine, metad); metad.Close() }, nil)
	f(10*time.Millisecond, func(engine, _ net.Conn) {
		fmt.Fprint(engine, "ask")
		_ = engine.SetDeadline(time.Now().Add(20 * time.Second))
		if b, err := io.ReadAll(engine); err != nil || len(b) > 0 {
			t.Errorf("the engine got %q, %v, want an end", b, err)
		}
	}, errNoAnswer)
}

func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("unix", l.Addr().String()); err == nil {
		b, err = l.Accept()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}
