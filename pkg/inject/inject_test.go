package inject

import (
	"errors"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"metad/internal/expect"
	"metad/pkg/mdfile"
	"metad/pkg/task"
)

const (
	testID  = "ef3dabed9bef087ed147024a221d2d3a822e85d53c0ca4024d3d78e7913eeb64"
	otherID = "aaaaabed9bef087ed147024a221d2d3a822e85d53c0ca4024d3d78e7913eeb64"
)

func newInjector(t *testing.T, cfg Config) *Injector {
	t.Helper()
	w, err := mdfile.NewWriter(mdfile.Config{DataDir: t.TempDir()}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return New(cfg, w)
}

// The label wins over the switch, for each of the two alone; the agent's own containers get
// nothing.
func TestWants(t *testing.T) {
	f := func(cfg Config, labels map[string]string, wantFile, wantURIs bool) {
		t.Helper()
		if file, uris := newInjector(t, cfg).Wants(labels); file != wantFile ||
			uris != wantURIs {
			t.Errorf("%+v with %v: got file %v, URIs %v", cfg, labels, file, uris)
		}
	}
	f(Config{}, nil, false, false)
	f(Config{URIs: true}, nil, false, true)
	f(Config{File: true}, nil, true, false)
	f(Config{}, map[string]string{LabelURIs: "true"}, false, true)
	f(Config{File: true, URIs: true}, map[string]string{LabelURIs: "false"}, true, false)
	f(Config{File: true, URIs: true}, map[string]string{LabelURIs: "maybe", LabelFile: "0"}, false, true)
	f(Config{File: true, URIs: true}, map[string]string{task.LabelContainerName: "~internal~ecs~pause", LabelURIs: "true"}, false, false)
}

// Both addresses carry one id, which begins with the task's where that is 32 hexadecimal digits.
func TestURIs(t *testing.T) {
	const hex, project = "0123456789abcdef0123456789abcdef", "shop"
	ecs := func(id string) map[string]string {
		return map[string]string{
			task.LabelTaskARN: "arn:aws:ecs:us-west-2:111122223333:task/default/" + id, task.LabelContainerName: "app"}
	}
	f := func(c Container, want string) {
		t.Helper()
		got := newInjector(t, Config{URIs: true}).URIs(c)
		m := regexp.MustCompile(
			`^ECS_CONTAINER_METADATA_URI=http://169.254.170.2/v3/(.*) ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/(.*)$`).
			FindStringSubmatch(strings.Join(got, " "))
		if m == nil || m[1] != m[2] ||
			!regexp.MustCompile("^"+want+"[0-9a-f]{32}$").MatchString(m[1]) {
			t.Errorf("%+v: got %q, want an id %s…", c, got, want)
		}
	}
	f(Container{Labels: ecs(hex)}, hex+"-")
	f(Container{Labels: ecs("one")}, "")
	f(Container{}, "")
	f(Container{ID: testID}, testID[:32]+"-")
	f(Container{ID: testID, Labels: ecs(hex)}, hex+"-")
	i := newInjector(t, Config{URIs: true})
	if a, b := i.URIs(Container{}), i.URIs(Container{}); a[0] == b[0] {
		t.Errorf("two containers with one id: %q", a[0])
	}
}

// A variable that the user or the agent has set is left alone, and then the other is not added
// either; what an earlier creation put in is replaced; what another metad has just put into this
// very container is not.
func TestURIsAlreadyThere(t *testing.T) {
	i := newInjector(t, Config{URIs: true})
	f := func(what string, env []string, wantAdded bool) {
		t.Helper()
		if got := i.URIs(Container{ID: testID, Env: env}); (got != nil) != wantAdded {
			t.Errorf("%s: %q: got %q", what, env, got)
		}
	}
	f("nothing", []string{"A=B", "ECS_CONTAINER_METADATA_FILE=/x"}, true)
	f("the user's", []string{EnvURIV4 + "=http://169.254.170.2/v4/self"}, false)
	f("the user's, empty", []string{EnvURI + "="}, false)
	f("the user's, unset", []string{EnvURI}, false)
	f("another address", []string{EnvURI + "=http://localhost/v3/0123456789abcdef0123456789abcdef"}, false)
	f("the agent's", []string{EnvURI + "=http://169.254.170.2/v3/2b88376d-aba3-4950-9ddf-bcb0f388a40c"}, false)
	f("Fargate's", []string{EnvURIV4 + "=http://169.254.170.2/v4/0123456789abcdef0123456789abcdef-2495160603"}, false)
	f("with a path", []string{EnvURIV4 + "=http://169.254.170.2/v4/0123456789abcdef0123456789abcdef/task"}, false)
	f("by the proxy", i.URIs(Container{}), true)
	f("another container's", i.URIs(Container{ID: otherID}), true)
	f("this container's", i.URIs(Container{ID: testID}), false)
}

// The container's own variable or mount is in the way of the file; what metad put in at an earlier
// creation is not.
func TestFileClaimed(t *testing.T) {
	i := newInjector(t, Config{File: true})
	root := i.files.Layout().Root() + "/default/1/app"
	f := func(what string, form mdfile.Form, env string, m Mount, wantClaimed bool) {
		t.Helper()
		c := Container{ID: testID, Name: "app"}
		if m != (Mount{}) {
			c.Mounts = func() []Mount { return []Mount{m} }
		}
		if env != "" {
			c.Env = []string{mdfile.EnvVar + env}
		}
		e, err := i.File(c, form)
		if errors.Is(err, ErrClaimed) != wantClaimed || err != nil && !wantClaimed {
			t.Errorf("%s: got %v", what, err)
		}
		if e != nil {
			e.Abandon()
		}
	}
	const dir = "0123456789abcdef0123456789abcdef"
	f("nothing", mdfile.FormProposal, "", Mount{}, false)
	f("the user's mount", mdfile.FormProposal, "", Mount{"/srv", "/ecs"}, true)
	f("beneath it", mdfile.FormProposal, "", Mount{"", "/ecs/x"}, true)
	f("over all", mdfile.FormProposal, "", Mount{"", "/"}, true)
	f("elsewhere", mdfile.FormProposal, "", Mount{"/srv", "/ecs2"}, false)
	f("not in the way by NRI", mdfile.FormPrivate, "", Mount{"/srv", "/ecs"}, false)
	f("the user's variable", mdfile.FormProposal, "=/mine", Mount{}, true)
	f("of an earlier creation", mdfile.FormProposal, "=/ecs/metadata/app/metadata.json", Mount{root, "/ecs/metadata/app"}, false)
	f("without its mount", mdfile.FormProposal, "=/ecs/metadata/app/metadata.json", Mount{}, true)
	f("another directory of the host", mdfile.FormProposal, "=/ecs/metadata/app/metadata.json", Mount{"/srv", "/ecs/metadata/app"}, true)
	f("of an earlier creation by NRI", mdfile.FormPrivate, "=/.metad/"+dir+"/metadata.json", Mount{}, false)
	f("another metad's, just now", mdfile.FormPrivate, "=/.metad/"+token(testID)+"/metadata.json", Mount{}, true)
	f("of an earlier creation in the agent's form", mdfile.FormAgent,
		"=/opt/ecs/metadata/"+dir+"/ecs-container-metadata.json",
		Mount{root, "/opt/ecs/metadata/" + dir}, false)
	f("the agent's", mdfile.FormProposal,
		"=/opt/ecs/metadata/2b88376d-aba3-4950-9ddf-bcb0f388a40c/ecs-container-metadata.json",
		Mount{root, "/opt/ecs/metadata/2b88376d-aba3-4950-9ddf-bcb0f388a40c"}, true)
}

// What a container has shows which way it came.
func TestWays(t *testing.T) {
	i := newInjector(t, Config{File: true, URIs: true})
	const uuid, hex = "2b88376d-aba3-4950-9ddf-bcb0f388a40c", "0123456789abcdef0123456789abcdef"
	root := i.files.Layout().Root() + "/default/1/app"
	f := func(wantFile, wantURIs string, env []string, volumes ...task.Volume) {
		t.Helper()
		if file, uris := i.Ways(&task.Container{ID: testID, MetadataEnv: env,
			Volumes: volumes}); file != wantFile || uris != wantURIs {
			t.Errorf("%q: got %q and %q, want %q and %q", env, file, uris, wantFile,
				wantURIs)
		}
	}
	f("", "", nil)
	f("", WayNRI, i.URIs(Container{ID: testID}))
	f("", WayProxy, i.URIs(Container{}))
	f("", WayAgent, []string{EnvURIV4 + "=" + uriV4 + uuid})
	f("", WayItself, []string{EnvURIV4 + "=" + uriV4 + "self"})
	f(WayItself, "", []string{mdfile.EnvVar + "=/mine"})
	f(WayProxy, "", []string{mdfile.EnvVar + "=/ecs/metadata/app/metadata.json"}, task.Volume{Source: root, Destination: "/ecs/metadata/app"})
	f(WayNRI, "", []string{mdfile.EnvVar + "=/.metad/" + hex + "/metadata.json"}, task.Volume{Source: root, Destination: "/.metad/" + hex})
	f(WayAgent, "", []string{mdfile.EnvVar + "=/opt/ecs/metadata/" + uuid +
		"/ecs-container-metadata.json"},
		task.Volume{Source: root, Destination: "/opt/ecs/metadata/" + uuid})
}

// Whoever takes out what is metad's own takes out nothing else.
func TestOwn(t *testing.T) {
	i := newInjector(t, Config{URIs: true})
	uris := i.URIs(Container{})
	for _, e := range uris {
		if !i.Own(e, nil, uris) {
			t.Errorf("%s: not recognised", e)
		}
		if i.Own(e, nil, nil) {
			t.Errorf("%s: taken out without being replaced", e)
		}
	}
	for _, e := range []string{EnvURI, EnvURI + "=", EnvURIV4 + "=" + uriV4 + "self",
		mdfile.EnvVar + "=/mine"} {
		if i.Own(e, nil, append(uris, "A=B", mdfile.EnvVar+"=/x")) {
			t.Errorf("%s: taken for metad's own", e)
		}
	}
}

// A creation does not wait for a data directory that hangs: it goes on without the file, the next
// ones at once, and the directory that is made too late is taken back.
func TestBounded(t *testing.T) {
	dir := t.TempDir()
	w, err := mdfile.NewWriter(mdfile.Config{DataDir: dir}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	i := New(Config{File: true}, w)
	files := i.Within(10 * time.Millisecond)
	hang := make(chan struct{})
	f := func(c Container, want string) {
		t.Helper()
		e, err := files.File(t.Context(), c, mdfile.FormPrivate, nil)
		if e != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, %v, want that the directory %s", c.Name, e, err, want)
		}
	}
	f(Container{Name: "slow", Mounts: func() []Mount { <-hang; return nil }}, "is slow") // in the disk's place
	f(Container{Name: "next"}, "hangs")
	ended := make(chan struct{})
	settle := func() error {
		<-hang
		close(ended)
		return nil
	}
	if err := files.Settle(settle); !errors.Is(err, errSlow) {
		t.Errorf("settle: got %v, want %v", err, errSlow)
	}
	close(hang)
	<-ended
	expect.Until(t, "the late ones to come", func() bool { return files.Late() == 0 })
	if err := i.Within(time.Minute).Settle(func() error { return fs.ErrClosed }); !errors.Is(
		err, fs.ErrClosed) {
		t.Errorf("settle: got %v, want %v", err, fs.ErrClosed)
	}
	if _, err := i.Within(time.Minute).File(t.Context(), Container{Name: "quick"},
		mdfile.FormPrivate, nil); err != nil {
		t.Fatal(err)
	}
	dirs, err := filepath.Glob(filepath.Join(dir, "metadata", "default", "*", "*"))
	if err != nil || len(dirs) != 1 || filepath.Base(dirs[0]) != "quick" {
		t.Errorf("got %q, %v, want the directory of quick alone", dirs, err)
	}
}
