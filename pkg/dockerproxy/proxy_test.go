package dockerproxy

import (
	"bufio"
	"bytes"
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
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"metad/internal/expect"
	"metad/pkg/inject"
	"metad/pkg/mdfile"
	"metad/pkg/task"
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
	if g.files, err = mdfile.NewWriter(mdfile.Config{DataDir: g.dataDir, Layout: layout}, writerLog); err != nil {
		t.Fatal(err)
	}
	if g.proxy, err = New(cfg.Config, inject.New(cfg.Inject, g.files), g.files, zap.New(core)); err != nil {
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
	g.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
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
	resp, err := g.client.Post("http://docker"+path, "application/json", strings.NewReader(body))
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

const (
	ecsLabels = `"com.amazonaws.ecs.task-arn":"arn:aws:ecs:us-west-2:111122223333:task/default/158d","com.amazonaws.ecs.container-name":"app",` +
		`"com.amazonaws.ecs.cluster":"default","com.amazonaws.ecs.task-definition-family":"web","com.amazonaws.ecs.task-definition-version":"7"`
	ecsBody = `{"Image":"nginx","Labels":{` + ecsLabels + `}}`
)

// F01: off by default, and then nothing is touched. The label wins over the switch.
func TestF01Switch(t *testing.T) {
	for _, tt := range []struct {
		name    string
		enabled bool
		label   string
		want    bool
	}{
		{"default", false, "", false},
		{"host on", true, "", true},
		{"label on", false, "true", true},
		{"label off", true, "false", false},
		{"label off in other words", true, "0", false},
		{"label is no truth value", true, "maybe", true},
		{"label is no truth value, host off", false, "maybe", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGround(t, config{Inject: inject.Config{File: tt.enabled}}, mdfile.Layout{})
			body := `{"Image":"nginx"}`
			if tt.label != "" {
				body = `{"Image":"nginx","Labels":{"` + inject.LabelFile + `":"` + tt.label + `"}}`
			}
			if status := g.post("/containers/create?name=web", body); status != http.StatusCreated {
				t.Errorf("got %d", status)
			}
			raw, env, binds := g.last()
			if got := len(g.dirs()) == 1; got != tt.want || (len(env) == 1) != tt.want || (len(binds) == 1) != tt.want {
				t.Errorf("got %v, %v, %v", g.dirs(), env, binds)
			}
			if !tt.want && raw != body {
				t.Errorf("body: got %s", raw)
			}
			if w := g.warnings(); len(w) != 0 {
				t.Errorf("warned: %v", w)
			}
		})
	}
}

// F02, F13, proposal 001: path forms, mount, variable, and the file after creation.
func TestF02Forms(t *testing.T) {
	f := func(form mdfile.Form, path, body, wantDir, wantContainerDir, wantFile string) {
		t.Helper()
		g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{Form: form})
		g.post(path, body)
		_, env, binds := g.last()
		dirs := g.dirs()
		if len(dirs) != 1 || len(env) != 1 || len(binds) != 1 {
			t.Fatalf("got %v, %v, %v", dirs, env, binds)
		}
		match := func(what, got, want string) {
			t.Helper()
			if ok, err := filepath.Match(want, got); !ok || err != nil {
				t.Errorf("%s: got %s, want %s", what, got, want)
			}
		}
		match("directory", dirs[0], wantDir)
		match("bind", binds[0], "/var/lib/ecs/data/metadata/"+wantDir+":"+wantContainerDir+":ro")
		match("variable", env[0], "ECS_CONTAINER_METADATA_FILE="+wantContainerDir+"/"+wantFile)
		if !strings.HasPrefix(binds[0], "/var/lib/ecs/data/metadata/"+dirs[0]+":") {
			t.Errorf("mounts %s, made %s", binds[0], dirs[0])
		}
		b, err := os.ReadFile(filepath.Join(g.dataDir, "metadata", dirs[0], mdfile.FileName))
		if err != nil || !strings.Contains(string(b), `"ContainerID": "`+testID+`",`) || !strings.Contains(string(b), `"ImageName": "nginx",`) {
			t.Errorf("file: %v: %s", err, b)
		}
	}
	f(mdfile.FormProposal, "/v1.41/containers/create?name=ecs-web-7-app-aabb", ecsBody, "default/158d/app", "/ecs/metadata/app", "metadata.json")
	f(mdfile.FormAgent, "/containers/create", ecsBody, "default/158d/app", "/opt/ecs/metadata/????????????????????????????????", "ecs-container-metadata.json")
	f(mdfile.FormProposal, "/containers/create?name=/web", `{"Image":"nginx"}`, "default/*/web", "/ecs/metadata/web", "metadata.json")
	f(mdfile.FormProposal, "/containers/create", `{"Image":"nginx"}`, "default/*/*", "/ecs/metadata/*", "metadata.json")
}

// A container gets the endpoint's address alone, or with its file; a refused one is created without either.
func TestURIs(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{URIs: true}}, mdfile.Layout{})
	if code := g.post("/containers/create?name=web", `{"Image":"i","Env":["A=1"],"HostConfig":{"Privileged":true}}`); code != http.StatusCreated {
		t.Errorf("got %d", code)
	}
	raw, env, binds := g.last()
	if len(env) != 3 || env[0] != "A=1" || !strings.HasPrefix(env[1], inject.EnvURI+"=http://169.254.170.2/v3/") ||
		!strings.HasPrefix(env[2], inject.EnvURIV4+"=http://169.254.170.2/v4/") || binds != nil || !strings.HasSuffix(raw, `"HostConfig":{"Privileged":true}}`) {
		t.Errorf("got %s", raw)
	}
	g.post("/containers/create", `{"Image":"i","Labels":{"`+inject.LabelFile+`":"true"}}`)
	if raw, env, binds := g.last(); len(env) != 3 || len(binds) != 1 {
		t.Errorf("with a file: got %s", raw)
	}
	g.post("/containers/create", `{"Image":"i","Labels":{"`+inject.LabelURIs+`":"false"}}`)
	if raw, env, _ := g.last(); env != nil {
		t.Errorf("label false: got %s", raw)
	}
	g.answers = []int{http.StatusBadRequest}
	if code := g.post("/containers/create", `{"Image":"i"}`); code != http.StatusCreated {
		t.Errorf("refused with the address: got %d", code)
	}
	if raw, env, _ := g.last(); env != nil || len(g.warnings()) != 1 {
		t.Errorf("refused with the address: got %s, %q", raw, g.warnings())
	}
}

// A configuration that was copied from a container has what metad put into that one: it is replaced, and what is the
// user's stays as it is, to the byte.
func TestRecreate(t *testing.T) {
	for _, form := range []mdfile.Form{mdfile.FormProposal, mdfile.FormAgent, mdfile.FormPrivate} {
		g := newGround(t, config{Inject: inject.Config{File: true, URIs: true}}, mdfile.Layout{Form: form})
		g.post("/containers/create?name=web", `{"Image":"i","Env":[ "A=1" ],"HostConfig":{"Binds":[ "/srv:/srv" ],"Mounts":[{"Type":"tmpfs","Target":"/t"}]}}`)
		first, oldEnv, oldBinds := g.last()
		source, target, _ := strings.Cut(strings.TrimSuffix(oldBinds[1], ":ro"), ":")
		for _, body := range []string{first, // as it was created through the proxy, and as by NRI
			strings.Replace(strings.Replace(first, `,"`+oldBinds[1]+`"`, "", 1), `{"Type":"tmpfs"`, `{"Type":"bind","Source":"`+source+`","Target":"`+target+`","ReadOnly":true},{"Type":"tmpfs"`, 1)} {
			g.post("/containers/create?name=web", body)
			raw, env, binds := g.last()
			if len(env) != 4 || env[0] != "A=1" || len(binds) != 2 || binds[0] != "/srv:/srv" || !strings.Contains(raw, `"Mounts":[{"Type":"tmpfs","Target":"/t"}]`) {
				t.Errorf("form %d: got %s of %s", form, raw, body)
				continue
			}
			if strings.Contains(raw, source+`"`) || strings.Contains(raw, source+":") || env[1] == oldEnv[1] {
				t.Errorf("form %d: what the other container has is in %s", form, raw)
			}
		}
	}
}

// Identify names the task of a container without the agent's labels.
func TestIdentify(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true, Identify: func(labels map[string]string, name string) (*task.Task, *task.Container) {
		if labels["project"] == "" {
			return nil, nil
		}
		return &task.Task{ARN: "arn:aws:ecs:x:1:task/compose/" + labels["project"]}, &task.Container{Name: labels["service"]}
	}}}, mdfile.Layout{})
	g.post("/containers/create?name=shop-web-1", `{"Image":"i","Labels":{"project":"shop","service":"web"}}`)
	if got := g.dirs(); !slices.Equal(got, []string{"compose/shop/web"}) {
		t.Errorf("got %v", got)
	}
	g.post("/containers/create?name=x", `{"Image":"i"}`)
	if got := g.dirs(); len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

// F03: none for the containers that the agent adds to a task.
func TestF03Pause(t *testing.T) {
	for _, name := range []string{task.PauseName, "~internal~ecs~pause-app", "~internal~ecs-emptyvolume-source"} {
		g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
		body := strings.Replace(ecsBody, `"app"`, `"`+name+`"`, 1)
		g.post("/containers/create", body)
		if raw, _, _ := g.last(); raw != body {
			t.Errorf("%s: got %s", name, raw)
		}
		g.empty()
	}
}

// Proposal 001: what the user mounts at or under /ecs turns the file off for that container. So do
// the agent's form's own path, a variable of the user's, and what --volumes-from brings.
func TestClaimedByUser(t *testing.T) {
	const proposal, agent = mdfile.FormProposal, mdfile.FormAgent
	for _, tt := range []struct {
		name string
		form mdfile.Form
		body string
		want bool // gets a file
	}{
		{"bind at", proposal, `{"HostConfig":{"Binds":["/srv:/ecs"]}}`, false},
		{"bind under", proposal, `{"HostConfig":{"Binds":["/srv:/ecs/x:ro"]}}`, false},
		{"bind at, not clean", proposal, `{"HostConfig":{"Binds":["/srv:/ecs/"]}}`, false},
		{"named volume", proposal, `{"HostConfig":{"Binds":["data:/ecs/metadata"]}}`, false},
		{"mount", proposal, `{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/srv","Target":"/ecs"}]}}`, false},
		{"tmpfs mount", proposal, `{"HostConfig":{"Mounts":[{"Type":"tmpfs","Target":"/ecs/metadata/app"}]}}`, false},
		{"volume", proposal, `{"Volumes":{"/ecs":{}}}`, false},
		{"tmpfs", proposal, `{"HostConfig":{"Tmpfs":{"/ecs/t":"size=1m"}}}`, false},
		{"from another", proposal, `{"HostConfig":{"VolumesFrom":["user:ro"]}}`, false},
		{"variable", proposal, `{"Env":["ECS_CONTAINER_METADATA_FILE=/mine"]}`, false},
		{"variable unset", proposal, `{"Env":["ECS_CONTAINER_METADATA_FILE"]}`, false},
		{"source only", proposal, `{"HostConfig":{"Binds":["/ecs:/data"]}}`, true},
		{"like it", proposal, `{"HostConfig":{"Binds":["/srv:/ecs2"],"Tmpfs":{"/var/ecs":""}},"Volumes":{"/opt/ecs":{}}}`, true},
		{"ours from another", proposal, `{"HostConfig":{"VolumesFrom":["ours"]}}`, true},
		{"from nobody", proposal, `{"HostConfig":{"VolumesFrom":["nobody"]}}`, true},
		{"agent's form, at /ecs", agent, `{"HostConfig":{"Binds":["/srv:/ecs"]}}`, true},
		{"agent's form, at", agent, `{"HostConfig":{"Binds":["/srv:/opt/ecs/metadata"]}}`, false},
		{"agent's form, over", agent, `{"HostConfig":{"Binds":["/srv:/opt:ro"]}}`, false},
		{"agent's form, beside", agent, `{"HostConfig":{"Binds":["/srv:/opt/ecs/other"]}}`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGround(t, config{Config{SELinux: SELinuxOff}, inject.Config{File: true}}, mdfile.Layout{Form: tt.form})
			g.handle = func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/containers/user/json":
					fmt.Fprint(w, `{"Mounts":[{"Type":"volume","Source":"/var/lib/docker/volumes/v/_data","Destination":"/ecs"}]}`)
				case "/containers/ours/json":
					fmt.Fprint(w, `{"Mounts":[{"Type":"bind","Source":"/var/lib/ecs/data/metadata/default/158d/ours","Destination":"/ecs/metadata/ours"}]}`)
				case "/containers/nobody/json":
					http.NotFound(w, r)
				default:
					b, _ := io.ReadAll(r.Body)
					g.mu.Lock()
					g.bodies = append(g.bodies, string(b))
					g.mu.Unlock()
					w.WriteHeader(http.StatusCreated)
					fmt.Fprint(w, `{"Id":"x"}`)
				}
			}
			g.post("/containers/create", tt.body)
			raw, _, _ := g.last()
			if got := len(g.dirs()) == 1; got != tt.want || (raw != tt.body) != tt.want {
				t.Errorf("got %v: %s", g.dirs(), raw)
			}
		})
	}
}

// F15: the Engine's report of SELinux in both spellings, or the configuration. The proposal's form
// shares files between containers, so its label is the shared one.
func TestF15SELinux(t *testing.T) {
	f := func(set SELinux, form mdfile.Form, options, want string) {
		t.Helper()
		g := newGround(t, config{Config{SELinux: set}, inject.Config{File: true}}, mdfile.Layout{Form: form})
		asked := 0
		g.handle = func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/info" {
				asked++
				fmt.Fprintf(w, `{"SecurityOptions":%s}`, options)
				return
			}
			b, _ := io.ReadAll(r.Body)
			g.bodies = append(g.bodies, string(b))
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, `{"Id":"x"}`)
		}
		for range 2 {
			g.post("/containers/create", ecsBody)
		}
		if _, _, binds := g.last(); len(binds) != 1 || !strings.HasSuffix(binds[0], want) {
			t.Errorf("%s, %s: got %v, want …%s", set, options, binds, want)
		}
		if asked > 1 {
			t.Errorf("asked %d times", asked)
		}
	}
	f("", mdfile.FormProposal, `["name=seccomp,profile=default","name=selinux"]`, ":ro,z")
	f(SELinuxAuto, mdfile.FormAgent, `["selinux"]`, ":ro,Z")
	f(SELinuxAuto, mdfile.FormAgent, `["name=selinux,level=s0"]`, ":ro,Z")
	f(SELinuxAuto, mdfile.FormAgent, `["name=apparmor","name=selinuxish"]`, ":ro")
	f(SELinuxAuto, mdfile.FormAgent, `null`, ":ro")
	f(SELinuxOn, mdfile.FormAgent, `null`, ":ro,Z")
	f(SELinuxOff, mdfile.FormAgent, `["selinux"]`, ":ro")
}

// F14 and the failures: the container is created, untouched, with one warning, and nothing is left.
func TestCreatedWithoutFile(t *testing.T) {
	name := func(n string) string {
		return strings.Replace(ecsBody, `"app"`, `"`+n+`"`, 1)
	}
	for _, tt := range []struct {
		name, body string
		prepare    func(*ground)
	}{
		{"F14 malformed ARN", strings.Replace(ecsBody, "task/default/158d", "service/x", 1), nil},
		{"slash", name("a/b"), nil},
		{"parent", name(".."), nil},
		{"unicode", name("größe"), nil},
		{"300 characters", name(strings.Repeat("n", 300)), nil},
		{"ARN leads out", strings.Replace(ecsBody, "task/default/158d", "task/../158d", 1), nil},
		{"file in the place of the directory", ecsBody, func(g *ground) {
			root := filepath.Join(g.dataDir, "metadata")
			err := os.MkdirAll(root, 0o755)
			if err == nil {
				err = os.WriteFile(filepath.Join(root, "default"), nil, 0o644)
			}
			if err != nil {
				g.t.Fatal(err)
			}
		}},
		{"body too long", `{"Image":"nginx","X":"` + strings.Repeat("x", 3000) + `"}`, nil},
		{"body not understood", `{"Image":"nginx","Env":["A=1"],"env":["B=1"]}`, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGround(t, config{Config{MaxBodyBytes: 2000}, inject.Config{File: true}}, mdfile.Layout{})
			if tt.prepare != nil {
				tt.prepare(g)
			}
			if status := g.post("/containers/create", tt.body); status != http.StatusCreated {
				t.Errorf("got %d", status)
			}
			if raw, _, _ := g.last(); raw != tt.body {
				t.Errorf("body: got %s", raw)
			}
			if w := g.warnings(); len(w) != 1 || !strings.HasPrefix(w[0], "container is created without its metadata file") {
				t.Errorf("got warnings %q, want one", w)
			}
			if tt.prepare == nil {
				g.empty()
			}
		})
	}
}

// The Engine does not create the container: the directory goes, the client gets the Engine's answer.
func TestNotCreated(t *testing.T) {
	for _, tt := range []struct {
		status, tries int
	}{{404, 1}, {409, 1}, {400, 2}, {500, 2}, {403, 2}} {
		g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
		g.answers = []int{tt.status, tt.status}
		if got := g.post("/containers/create", ecsBody); got != tt.status || len(g.bodies) != tt.tries {
			t.Errorf("%d: got %d after %d tries", tt.status, got, len(g.bodies))
		}
		g.empty()
		if w := g.warnings(); len(w) != 0 {
			t.Errorf("%d: warned %v", tt.status, w)
		}
	}
}

// The Engine does not want the mount (a plug-in forbids it, the directory is not on its host): the container is created without.
func TestRefusedWithFile(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	g.answers = []int{http.StatusForbidden}
	if got := g.post("/containers/create", ecsBody); got != http.StatusCreated {
		t.Errorf("got %d", got)
	}
	if raw, _, _ := g.last(); raw != ecsBody {
		t.Errorf("body: got %s", raw)
	}
	g.empty()
	if w := g.warnings(); len(w) != 1 || !strings.Contains(w[0], "status 403") {
		t.Errorf("got warnings %v", w)
	}
}

// The basic facts cannot be written after the creation, or the Engine's answer has no id: the client
// gets its answer, and the file is made up for later.
func TestCreatedButNotWritten(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	answer := `{"Id":"x"}`
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/containers/create" {
			_ = os.RemoveAll(filepath.Join(g.dataDir, "metadata", "default"))
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, answer)
		}
	}
	if status := g.post("/containers/create", ecsBody); status != http.StatusCreated {
		t.Errorf("got %d", status)
	}
	if w := g.warnings(); len(w) != 1 || !strings.HasPrefix(w[0], "metadata file not written at creation") {
		t.Errorf("got warnings %q", w)
	}
	c := &task.Container{ID: "x", Name: "app", State: "running", PID: 1}
	g.files.Apply([]*task.Task{{ARN: "arn:aws:ecs:us-west-2:111122223333:task/default/158d", Containers: []*task.Container{c}}})
	if got := g.dirs(); !slices.Equal(got, []string{"default/158d/app"}) {
		t.Errorf("got %v", got)
	}

	answer = `{}`
	if status := g.post("/containers/create", ecsBody); status != http.StatusCreated {
		t.Errorf("got %d", status)
	}
	if w := g.warnings(); len(w) != 1 {
		t.Errorf("got warnings %q", w)
	}
}

// The data directory begins to hang while the Engine creates the container: the client gets its answer,
// with one warning, and so does the next, whose container has no file. What was begun ends by itself.
func TestDiskHangsAfterCreation(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	left, err := g.files.Reserve(&task.Task{}, &task.Container{Name: "left"}, mdfile.FormProposal, strings.Repeat("0", 32))
	if err != nil {
		t.Fatal(err)
	}
	left.Unsure()
	// The Writer says of a directory that it sweeps it while it holds what all of its methods need.
	hangs, thawed, swept := make(chan struct{}), make(chan struct{}), make(chan struct{})
	g.wrote = func(zapcore.Entry) {
		close(hangs)
		<-thawed
	}
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/containers/create" {
			http.NotFound(w, r)
			return
		}
		select {
		case <-hangs:
		default:
			go func() {
				defer close(swept)
				g.files.Sweep(time.Now().Add(time.Hour), nil)
			}()
			<-hangs
		}
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"Id":%q}`, testID)
	}
	for n, want := range []string{"metadata file not written at creation", "container is created without its metadata file"} {
		if status := g.post("/containers/create", ecsBody); status != http.StatusCreated {
			t.Errorf("creation %d: got %d", n, status)
		}
		if w := g.warnings(); len(w) != n+1 || !strings.HasPrefix(w[n], want) {
			t.Errorf("creation %d: got warnings %q, the last to be: %s", n, w, want)
		}
	}
	close(thawed)
	<-swept
	expect.Until(t, "the file to name the container", func() bool {
		b, err := os.ReadFile(filepath.Join(g.dataDir, "metadata/default/158d/app", mdfile.FileName))
		return err == nil && strings.Contains(string(b), testID)
	})
}

// The Engine is not there: an error in its own form, and the directory is kept only as long as the
// container might have been created.
func TestEngineGone(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	if err := os.Remove(g.proxy.cfg.Engine); err != nil {
		t.Fatal(err)
	}
	resp, err := g.client.Get("http://docker/_ping")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var message struct{ Message string }
	if err := json.NewDecoder(resp.Body).Decode(&message); err != nil || resp.StatusCode != http.StatusBadGateway || !strings.Contains(message.Message, "engine.sock") {
		t.Errorf("got %d, %+v, %v", resp.StatusCode, message, err)
	}
	if status := g.post("/containers/create", ecsBody); status != http.StatusBadGateway {
		t.Errorf("create: got %d", status)
	}
	if got := len(g.dirs()); got != 1 {
		t.Errorf("got %d directories", got)
	}
}

// Everything else passes without a change: paths, queries, headers, bodies, statuses.
func TestPassesUnchanged(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	type request struct{ method, uri, host, agent, auth, body string }
	var got request
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = request{r.Method, r.RequestURI, r.Host, r.UserAgent(), r.Header.Get("X-Registry-Auth"), string(b)}
		if r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Accept-Encoding") != "" {
			t.Errorf("headers were added: %v", r.Header)
		}
		w.Header()["Date"] = nil
		w.Header()["Content-Type"] = nil
		w.Header().Set("Api-Version", "1.41")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, "<html>")
	}
	for _, want := range []request{
		{"GET", "/v1.41/containers/json?filters=%7B%22label%22%3A%7B%22a%3Bb%22%3Atrue%7D%7D&x=1;2", "docker", "Docker-Client/20.10", "", ""},
		{"GET", "/v1.41/images/a%2Fb/json", "docker", "x", "abc=", ""},
		{"PUT", "/containers/x/archive?path=%2F", "docker", "x", "", "tar"},
		{"POST", "/containers/create/", "docker", "x", "", `{"Image":"i"}`},
		{"GET", "/containers/create", "docker", "x", "", ""},
		{"POST", "/networks/create", "docker", "x", "", `{"Name":"n"}`},
		{"DELETE", "//x//y", "docker", "x", "", ""},
	} {
		r, err := http.NewRequest(want.method, "http://docker"+want.uri, strings.NewReader(want.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("User-Agent", want.agent)
		if want.auth != "" {
			r.Header.Set("X-Registry-Auth", want.auth)
		}
		resp, err := g.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
		if resp.StatusCode != http.StatusTeapot || string(body) != "<html>" || resp.Header.Get("Api-Version") != "1.41" {
			t.Errorf("answer: got %d, %q, %v", resp.StatusCode, body, resp.Header)
		}
		if resp.Header.Get("Date") != "" || resp.Header.Get("Content-Type") != "" {
			t.Errorf("headers were added: %v", resp.Header)
		}
	}
}

// Streams pass as they come, in both directions, after an upgrade and without; the end of one
// direction is not the end of the other.
func TestStreams(t *testing.T) {
	g := newGround(t, config{}, mdfile.Layout{})
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" { // answers while it reads
			_ = http.NewResponseController(w).EnableFullDuplex()
			lines := bufio.NewReader(r.Body)
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					return
				}
				fmt.Fprint(w, "got ", line)
				_ = http.NewResponseController(w).Flush()
			}
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello\n")
		all, _ := io.ReadAll(rw) // to the end of the client's half
		fmt.Fprintf(conn, "got %s", all)
	}

	conn, err := net.Dial("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprint(conn, "POST /v1.41/containers/x/attach?stream=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Status != "101 UPGRADED" {
		t.Fatalf("upgrade: got %+v, %v", resp, err)
	}
	if line, err := in.ReadString('\n'); line != "hello\n" {
		t.Errorf("got %q, %v", line, err)
	}
	fmt.Fprint(conn, "input")
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(in); string(rest) != "got input" {
		t.Errorf("after the end of input: got %q, %v", rest, err)
	}

	body, input := io.Pipe()
	r, _ := http.NewRequest(http.MethodPost, "http://docker/build", body)
	answer, err := func() (*http.Response, error) {
		go fmt.Fprintln(input, "one")
		return g.client.Do(r)
	}()
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewReader(answer.Body)
	for _, want := range []string{"got one\n", "got two\n"} {
		if got, err := lines.ReadString('\n'); got != want {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
		go fmt.Fprintln(input, "two")
	}
	input.Close()
}

// Archives are tunnelled: whole, in both directions, with the length known or not; a connection that
// was used for one is not used again; and who leaves ends the Engine's work.
func TestArchives(t *testing.T) {
	g := newGround(t, config{}, mdfile.Layout{})
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	left := make(chan error, 1)
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/endless/export"):
			for {
				if _, err := w.Write(big); err != nil {
					left <- err
					return
				}
			}
		case strings.HasSuffix(r.URL.Path, "/quiet/export"):
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			left <- r.Context().Err()
		case r.Method == http.MethodGet:
			_, _ = w.Write(big)
		default:
			body, err := io.ReadAll(r.Body)
			fmt.Fprint(w, r.Method, " ", r.RequestURI, " ", r.ContentLength, " ", bytes.Equal(body, big), " ", err, " ", r.UserAgent())
		}
	}
	do := func(method, uri string, body io.Reader, want string) {
		t.Helper()
		r, _ := http.NewRequest(method, "http://docker"+uri, body)
		r.Header.Set("User-Agent", "test")
		r.Header.Set("Expect", "100-continue")
		resp, err := g.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); string(got) != want || err != nil {
			t.Errorf("%s %s: got %.200q, %v", method, uri, got, err)
		}
		if !resp.Close {
			t.Error("the client may use the connection again")
		}
	}
	for range 2 {
		do("GET", "/v1.41/containers/x/archive?path=%2Fa%3Bb", nil, string(big))
		do("GET", "/images/a%2Fb:c/get", nil, string(big))
		do("PUT", "/containers/x/archive?path=%2F", bytes.NewReader(big), "PUT /containers/x/archive?path=%2F 2097152 true <nil> test")
		do("PUT", "/v1.41/containers/x/archive", io.MultiReader(bytes.NewReader(big)), "PUT /v1.41/containers/x/archive -1 true <nil> test")
		do("POST", "/images/load", http.NoBody, "POST /images/load 0 false <nil> test")
	}

	for _, path := range []string{"/containers/endless/export", "/containers/quiet/export"} {
		resp, err := g.client.Get("http://docker" + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		select {
		case <-left:
		case <-time.After(time.Minute):
			t.Errorf("%s: the Engine works on for a client that has left", path)
		}
	}

	if err := os.Remove(g.proxy.cfg.Engine); err != nil {
		t.Fatal(err)
	}
	resp, err := g.client.Get("http://docker/containers/x/export")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadGateway {
		t.Errorf("without the Engine: got %d", resp.StatusCode)
	}
}

// The body may be longer than the bound, even far longer: it passes, and is not kept in memory.
func TestLongBodyPasses(t *testing.T) {
	g := newGround(t, config{Config: Config{MaxBodyBytes: 10}}, mdfile.Layout{})
	var n int64
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		n, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}
	body := bytes.Repeat([]byte(" "), 10<<20)
	resp, err := g.client.Post("http://docker/containers/create", "application/json", io.MultiReader(bytes.NewReader(body))) // chunked
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n != int64(len(body)) {
		t.Errorf("got %d bytes, want %d", n, len(body))
	}
}

// 100 at a time.
func TestParallelCreates(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"Id":"id-%s"}`, r.URL.Query().Get("name"))
	}
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			if status := g.post(fmt.Sprintf("/containers/create?name=c%d", i), `{"Image":"i"}`); status != http.StatusCreated {
				t.Errorf("got %d", status)
			}
		})
	}
	wg.Wait()
	if got := len(g.dirs()); got != 100 {
		t.Errorf("got %d directories", got)
	}
}

func TestLimiter(t *testing.T) {
	now := time.Unix(1000, 0)
	l := limiter{now: func() time.Time { return now }}
	allowed := 0
	for range 25 {
		if ok, _ := l.allow(); ok {
			allowed++
		}
	}
	now = now.Add(11 * time.Second)
	ok, held := l.allow()
	if allowed != 10 || !ok || held != 15 {
		t.Errorf("got %d allowed, then %v with %d held back", allowed, ok, held)
	}
}

func TestValidate(t *testing.T) {
	f := func(c Config, field string) {
		t.Helper()
		err := c.Validate()
		if (err == nil) != (field == "") || err != nil && !strings.HasPrefix(err.Error(), field+" ") {
			t.Errorf("%+v: got %v, want one about %q", c, err, field)
		}
	}
	f(Config{}, "")
	f(Config{Engine: "/e.sock", SELinux: SELinuxOn, MaxBodyBytes: 1}, "")
	f(Config{Engine: "tcp://x"}, "Engine")
	f(Config{SELinux: "Z"}, "SELinux")
	f(Config{MaxBodyBytes: -1}, "MaxBodyBytes")
	if _, err := New(Config{SELinux: "Z"}, nil, nil, nil); err == nil {
		t.Error("New: no error")
	}
}

// As long as there is no Engine, its group cannot be known, and the socket is root's alone. It is the group's as soon as
// the Engine's socket is.
func TestListenBeforeTheEngine(t *testing.T) {
	dir := t.TempDir()
	engine, path := filepath.Join(dir, "engine.sock"), filepath.Join(dir, "run", "docker.sock")
	l, err := Listen(path, engine)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mode := func() fs.FileMode {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	if got := mode(); got != 0o600 {
		t.Errorf("before the Engine: %v, want 0600", got)
	}
	e, err := net.Listen("unix", engine)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := os.Chmod(engine, 0o660); err != nil {
		t.Fatal(err)
	}
	expect.Until(t, "the socket is the group's", func() bool { return mode() == 0o660 })
}

// The socket lets in whom the Engine's lets in, replaces a dead or living one, and goes with its
// listener.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	engine, path := filepath.Join(dir, "engine.sock"), filepath.Join(dir, "run", "docker.sock")
	e, err := net.Listen("unix", engine)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	mode := func(of string, chmod, want fs.FileMode) {
		t.Helper()
		if chmod != 0 {
			if err := os.Chmod(engine, chmod); err != nil {
				t.Fatal(err)
			}
		}
		l, err := Listen(path, of)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("Engine's %v: got %v, %v", chmod, info.Mode(), err)
		}
		if was, _ := os.Stat(engine); of == engine && was.Sys().(*syscall.Stat_t).Gid != info.Sys().(*syscall.Stat_t).Gid {
			t.Error("another group than the Engine's socket")
		}
	}
	mode(engine, 0o660, 0o660)
	mode(engine, 0o777, 0o660)
	mode(engine, 0o600, 0o600)
	mode("/nonexistent", 0, 0o600)

	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	old, err := Listen(path, engine)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, engine)
	if err != nil {
		t.Fatal(err)
	}
	old.Succeed() // has been
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Errorf("after the old listener has closed: %v", err)
	} else {
		conn.Close()
	}
	l.Close()
	if list, _ := os.ReadDir(filepath.Dir(path)); len(list) != 0 {
		t.Errorf("left behind: %v", list)
	}

	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, engine); err == nil {
		t.Error("in the place of a file: no error")
	}
}
