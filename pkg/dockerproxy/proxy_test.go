package dockerproxy

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zapcore"

	"metad/internal/expect"
	"metad/pkg/inject"
	"metad/pkg/mdfile"
	"metad/pkg/task"
)

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
			g := newGround(t, config{Inject: inject.Config{File: tt.enabled}},
				mdfile.Layout{})
			body := `{"Image":"nginx"}`
			if tt.label != "" {
				body = `{"Image":"nginx","Labels":{"` + inject.LabelFile + `":"` +
					tt.label + `"}}`
			}
			if status := g.post("/containers/create?name=web",
				body); status != http.StatusCreated {
				t.Errorf("got %d", status)
			}
			raw, env, binds := g.last()
			if got := len(g.dirs()) == 1; got != tt.want ||
				(len(env) == 1) != tt.want || (len(binds) == 1) != tt.want {
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
		g := newGround(t, config{Inject: inject.Config{File: true}},
			mdfile.Layout{Form: form})
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
		b, err := os.ReadFile(filepath.Join(g.dataDir, "metadata", dirs[0],
			mdfile.FileName))
		if err != nil || !strings.Contains(string(b), `"ContainerID": "`+testID+`",`) ||
			!strings.Contains(string(b), `"ImageName": "nginx",`) {
			t.Errorf("file: %v: %s", err, b)
		}
	}
	f(mdfile.FormProposal, "/v1.41/containers/create?name=ecs-web-7-app-aabb", ecsBody, "default/158d/app", "/ecs/metadata/app", "metadata.json")
	f(mdfile.FormAgent, "/containers/create", ecsBody, "default/158d/app", "/opt/ecs/metadata/????????????????????????????????", "ecs-container-metadata.json")
	f(mdfile.FormProposal, "/containers/create?name=/web", `{"Image":"nginx"}`, "default/*/web", "/ecs/metadata/web", "metadata.json")
	f(mdfile.FormProposal, "/containers/create", `{"Image":"nginx"}`, "default/*/*", "/ecs/metadata/*", "metadata.json")
}

// A container gets the endpoint's address alone, or with its file; a refused one is created without
// either.
func TestURIs(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{URIs: true}}, mdfile.Layout{})
	if code := g.post("/containers/create?name=web",
		`{"Image":"i","Env":["A=1"],"HostConfig":{"Privileged":true}}`); code != http.StatusCreated {
		t.Errorf("got %d", code)
	}
	raw, env, binds := g.last()
	if len(env) != 3 || env[0] != "A=1" ||
		!strings.HasPrefix(env[1], inject.EnvURI+"=http://169.254.170.2/v3/") ||
		!strings.HasPrefix(env[2], inject.EnvURIV4+"=http://169.254.170.2/v4/") ||
		binds != nil || !strings.HasSuffix(raw, `"HostConfig":{"Privileged":true}}`) {
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

// A configuration that was copied from a container has what metad put into that one: it is
// replaced, and what is the user's stays as it is, to the byte.
func TestRecreate(t *testing.T) {
	for _, form := range []mdfile.Form{mdfile.FormProposal, mdfile.FormAgent,
		mdfile.FormPrivate} {
		g := newGround(t, config{Inject: inject.Config{File: true, URIs: true}},
			mdfile.Layout{Form: form})
		g.post("/containers/create?name=web",
			`{"Image":"i","Env":[ "A=1" ],"HostConfig":{"Binds":[ "/srv:/srv" ],"Mounts":[{"Type":"tmpfs","Target":"/t"}]}}`)
		first, oldEnv, oldBinds := g.last()
		source, target, _ := strings.Cut(strings.TrimSuffix(oldBinds[1], ":ro"), ":")
		// as it was created through the proxy, and as by NRI
		for _, body := range []string{first,
			strings.Replace(strings.Replace(first, `,"`+oldBinds[1]+`"`, "", 1), `{"Type":"tmpfs"`, `{"Type":"bind","Source":"`+source+`","Target":"`+target+`","ReadOnly":true},{"Type":"tmpfs"`, 1)} {
			g.post("/containers/create?name=web", body)
			raw, env, binds := g.last()
			if len(env) != 4 || env[0] != "A=1" || len(binds) != 2 ||
				binds[0] != "/srv:/srv" || !strings.Contains(raw,
				`"Mounts":[{"Type":"tmpfs","Target":"/t"}]`) {
				t.Errorf("form %d: got %s of %s", form, raw, body)
				continue
			}
			if strings.Contains(raw, source+`"`) || strings.Contains(raw, source+":") ||
				env[1] == oldEnv[1] {
				t.Errorf("form %d: what the other container has is in %s", form,
					raw)
			}
		}
	}
}

// Identify names the task of a container without the agent's labels.
func TestIdentify(t *testing.T) {
	g := newGround(t,
		config{Inject: inject.Config{File: true, Identify: func(labels map[string]string,
			name string) (*task.Task, *task.Container) {
			if labels["project"] == "" {
				return nil, nil
			}
			return &task.Task{ARN: "arn:aws:ecs:x:1:task/compose/" + labels["project"]},
				&task.Container{Name: labels["service"]}
		}}}, mdfile.Layout{})
	g.post("/containers/create?name=shop-web-1",
		`{"Image":"i","Labels":{"project":"shop","service":"web"}}`)
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
	for _, name := range []string{task.PauseName, "~internal~ecs~pause-app",
		"~internal~ecs-emptyvolume-source"} {
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
			g := newGround(t, config{Config{SELinux: SELinuxOff},
				inject.Config{File: true}}, mdfile.Layout{Form: tt.form})
			g.handle = func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/containers/user/json":
					fmt.Fprint(w,
						`{"Mounts":[{"Type":"volume","Source":"/var/lib/docker/volumes/v/_data","Destination":"/ecs"}]}`)
				case "/containers/ours/json":
					fmt.Fprint(w,
						`{"Mounts":[{"Type":"bind","Source":"/var/lib/ecs/data/metadata/default/158d/ours","Destination":"/ecs/metadata/ours"}]}`)
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
			if got := len(g.dirs()) == 1; got != tt.want ||
				(raw != tt.body) != tt.want {
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
		g := newGround(t, config{Config{SELinux: set}, inject.Config{File: true}},
			mdfile.Layout{Form: form})
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
			g := newGround(t, config{Config{MaxBodyBytes: 2000},
				inject.Config{File: true}}, mdfile.Layout{})
			if tt.prepare != nil {
				tt.prepare(g)
			}
			if status := g.post("/containers/create",
				tt.body); status != http.StatusCreated {
				t.Errorf("got %d", status)
			}
			if raw, _, _ := g.last(); raw != tt.body {
				t.Errorf("body: got %s", raw)
			}
			if w := g.warnings(); len(w) != 1 || !strings.HasPrefix(w[0],
				"container is created without its metadata file") {
				t.Errorf("got warnings %q, want one", w)
			}
			if tt.prepare == nil {
				g.empty()
			}
		})
	}
}

// The Engine does not create the container: the directory goes, the client gets the Engine's
// answer.
func TestNotCreated(t *testing.T) {
	for _, tt := range []struct {
		status, tries int
	}{{404, 1}, {409, 1}, {400, 2}, {500, 2}, {403, 2}} {
		g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
		g.answers = []int{tt.status, tt.status}
		if got := g.post("/containers/create", ecsBody); got != tt.status ||
			len(g.bodies) != tt.tries {
			t.Errorf("%d: got %d after %d tries", tt.status, got, len(g.bodies))
		}
		g.empty()
		if w := g.warnings(); len(w) != 0 {
			t.Errorf("%d: warned %v", tt.status, w)
		}
	}
}

// The Engine does not want the mount (a plug-in forbids it, the directory is not on its host): the
// container is created without.
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

// The basic facts cannot be written after the creation, or the Engine's answer has no id: the
// client gets its answer, and the file is made up for later.
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
	if w := g.warnings(); len(w) != 1 ||
		!strings.HasPrefix(w[0], "metadata file not written at creation") {
		t.Errorf("got warnings %q", w)
	}
	c := &task.Container{ID: "x", Name: "app", State: "running", PID: 1}
	g.files.Apply([]*task.Task{{ARN: "arn:aws:ecs:us-west-2:111122223333:task/default/158d",
		Containers: []*task.Container{c}}})
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

// The data directory begins to hang while the Engine creates the container: the client gets its
// answer, with one warning, and so does the next, whose container has no file. What was begun ends
// by itself.
func TestDiskHangsAfterCreation(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	left, err := g.files.Reserve(&task.Task{}, &task.Container{Name: "left"},
		mdfile.FormProposal, strings.Repeat("0", 32))
	if err != nil {
		t.Fatal(err)
	}
	left.Unsure()
	// The Writer says of a directory that it sweeps it while it holds what all of its methods
	// need.
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
	for n, want := range []string{"metadata file not written at creation",
		"container is created without its metadata file"} {
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
		b, err := os.ReadFile(filepath.Join(g.dataDir, "metadata/default/158d/app",
			mdfile.FileName))
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
	if err := json.NewDecoder(resp.Body).Decode(&message); err != nil ||
		resp.StatusCode != http.StatusBadGateway || !strings.Contains(message.Message,
		"engine.sock") {
		t.Errorf("got %d, %+v, %v", resp.StatusCode, message, err)
	}
	if status := g.post("/containers/create", ecsBody); status != http.StatusBadGateway {
		t.Errorf("create: got %d", status)
	}
	if got := len(g.dirs()); got != 1 {
		t.Errorf("got %d directories", got)
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
			if status := g.post(fmt.Sprintf("/containers/create?name=c%d", i),
				`{"Image":"i"}`); status != http.StatusCreated {
				t.Errorf("got %d", status)
			}
		})
	}
	wg.Wait()
	if got := len(g.dirs()); got != 100 {
		t.Errorf("got %d directories", got)
	}
}
