package dockerproxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// ground is a proxy in front of a stand-in for the Engine.
type ground struct {
	t       *testing.T
	dataDir string
	files   *mdfile.Writer
	proxy   *Proxy
	logs    *observer.ObservedLogs
	client  *http.Client // through the proxy
	socket  string

	mu      sync.Mutex
	bodies  []string // of create requests, as the Engine got them
	answers []int    // status codes of the next creations; then 201
	handle  http.HandlerFunc
	wrote   func(zapcore.Entry) // hears what the Writer logs; nil: nothing does
}

const testID = "ef3dabed9bef087ed147024a221d2d3a822e85d53c0ca4024d3d78e7913eeb64"

// config is a proxy's and what it puts in.
type config struct {
	Config
	Inject inject.Config
}

func newGround(t *testing.T, cfg config, layout mdfile.Layout) *ground {
	t.Helper()
	g := &ground{t: t, dataDir: t.TempDir()}
	dir := t.TempDir()
	cfg.Engine = filepath.Join(dir, "engine.sock")
	core, logs := observer.New(zap.DebugLevel)
	g.logs = logs
	engine, err := net.Listen("unix", cfg.Engine)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(g.engine)}
	go server.Serve(engine)
	t.Cleanup(func() { server.Close() })

	writerLog := zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		if g.wrote != nil {
			g.wrote(e)
		}
		return nil
	}))
	if g.files, err = mdfile.NewWriter(mdfile.Config{DataDir: g.dataDir, Layout: layout},
		writerLog); err != nil {
		t.Fatal(err)
	}
	if g.proxy, err = New(cfg.Config, inject.New(cfg.Inject, g.files), g.files,
		zap.New(core)); err != nil {
		t.Fatal(err)
	}
	g.socket = filepath.Join(dir, "metad", "docker.sock")
	l, err := Listen(g.socket, cfg.Engine)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- g.proxy.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := g.files.Close(); err != nil {
			t.Error(err)
		}
	})
	g.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _,
		_ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", g.socket)
	}, DisableCompression: true}}
	t.Cleanup(g.client.CloseIdleConnections)
	return g
}

func (g *ground) engine(w http.ResponseWriter, r *http.Request) {
	if g.handle != nil {
		g.handle(w, r)
		return
	}
	if strings.HasSuffix(r.URL.Path, "/json") {
		http.NotFound(w, r)
		return
	}
	body, _ := io.ReadAll(r.Body)
	g.mu.Lock()
	defer g.mu.Unlock()
	status := http.StatusCreated
	if r.URL.Path == "/info" {
		fmt.Fprint(w, `{}`)
		return
	}
	g.bodies = append(g.bodies, string(body))
	if len(g.answers) > 0 {
		status, g.answers = g.answers[0], g.answers[1:]
	}
	w.WriteHeader(status)
	if status == http.StatusCreated {
		fmt.Fprintf(w, `{"Id":"%s","Warnings":[]}`+"\n", testID)
	} else {
		fmt.Fprintf(w, `{"message":"status %d"}`+"\n", status)
	}
}

// post sends a create request and returns the status.
func (g *ground) post(path, body string) int {
	g.t.Helper()
	resp, err := g.client.Post("http://docker"+path, "application/json",
		strings.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		g.t.Fatal(err)
	}
	return resp.StatusCode
}

// last returns the body of the last create request, parsed.
func (g *ground) last() (raw string, env, binds []string) {
	g.t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	var b struct {
		Env        []string
		HostConfig struct{ Binds []string }
	}
	if len(g.bodies) == 0 {
		g.t.Fatal("the Engine got no create request")
	}
	raw = g.bodies[len(g.bodies)-1]
	_ = json.Unmarshal([]byte(raw), &b)
	return raw, b.Env, b.HostConfig.Binds
}

// dirs lists the directories that hold a file.
func (g *ground) dirs() (dirs []string) {
	g.t.Helper()
	root := filepath.Join(g.dataDir, "metadata")
	_ = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() == mdfile.FileName {
			rel, _ := filepath.Rel(root, filepath.Dir(p))
			dirs = append(dirs, rel)
		}
		return err
	})
	return dirs
}

// empty checks that no directory is left. The writer makes their root when it first needs it.
func (g *ground) empty() {
	g.t.Helper()
	list, err := os.ReadDir(filepath.Join(g.dataDir, "metadata"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) || len(list) != 0 {
		g.t.Errorf("left behind: %v, %v", list, err)
	}
}

func (g *ground) warnings() (texts []string) {
	for _, e := range g.logs.FilterLevelExact(zap.WarnLevel).All() {
		texts = append(texts, fmt.Sprint(e.Message, e.ContextMap()))
	}
	return texts
}
