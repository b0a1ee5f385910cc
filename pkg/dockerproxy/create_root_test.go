//go:build root

package dockerproxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/docker/docker/api/types/container"

	"metad/internal/testdocker"
	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// The user's mounts at /ecs win: real ones, of every kind.
func TestRootUserHasECS(t *testing.T) {
	g := newRootGround(t, options{})
	for _, args := range [][]string{
		{"-v", "/ecs"}, {"-v", g.Dir + "/empty:/ecs/x"}, {"-v", "named-volume:/ecs/metadata"},
		{"--mount", "type=tmpfs,dst=/ecs"}, {"--tmpfs", "/ecs/t"}, {"-e", "ECS_CONTAINER_METADATA_FILE=/mine"},
	} {
		id := g.start(append(args, "--label", "test=user-ecs")...)
		inspect := g.Inspect(t, id)
		for _, m := range inspect.Mounts {
			if strings.HasPrefix(m.Source, g.dataDir) {
				t.Errorf("%q: got %+v", args, m)
			}
		}
		if args[0] != "-e" && slices.ContainsFunc(inspect.Config.Env, func(e string) bool {
			return strings.HasPrefix(e, mdfile.EnvVar)
		}) {
			t.Errorf("%q: got %q", args, inspect.Config.Env)
		}
		// Nor where it comes from another container.
		if args[0] == "-v" && args[1] == "/ecs" {
			from := g.start("--volumes-from", id)
			if n := len(g.Inspect(t, from).Mounts); n != 1 {
				t.Errorf("--volumes-from: got %d mounts", n)
			}
		}
		g.empty()
	}
	if n := g.warnings(); n != 0 {
		t.Errorf("got %d warnings", n)
	}
}

// F18, F02, and containers that are harder to mount into: a read-only root, a volume of the image
// at /ecs.
func TestRootF18UserKept(t *testing.T) {
	g := newRootGround(t, options{form: mdfile.FormAgent})
	id := g.start("-e", "A=1", "-e", "B=2", "-v", g.Dir+":/host:ro", "--read-only", "--tmpfs",
		"/run", "--memory", "64m")
	inspect := g.Inspect(t, id)
	// The Engine keeps the variables in a map and promises no order among the user's own; what
	// metad adds is the last of the request, and of the image's variables none comes after it.
	env := inspect.Config.Env
	own := slices.IndexFunc(env, func(v string) bool {
		return strings.HasPrefix(v, "ECS_CONTAINER_METADATA_FILE=")
	})
	if own < 0 || !slices.Contains(env[:own], "A=1") || !slices.Contains(env[:own], "B=2") {
		t.Errorf("env: got %q, want A=1 and B=2 in any order before metad's variable", env)
	}
	if b := inspect.HostConfig.Binds; len(b) != 2 || b[0] != g.Dir+":/host:ro" ||
		!strings.HasPrefix(b[1], g.dataDir+"/metadata/default/") {
		t.Errorf("binds: got %q", b)
	}
	if inspect.HostConfig.Memory != 64<<20 {
		t.Errorf("memory: got %d", inspect.HostConfig.Memory)
	}
	g.until("READY", g.dir(id), ready)
	out := g.Exec(t, id, "sh", "-c",
		`echo $ECS_CONTAINER_METADATA_FILE; grep -c READY $ECS_CONTAINER_METADATA_FILE`)
	if ok, _ := filepath.Match(
		"/opt/ecs/metadata/????????????????????????????????/ecs-container-metadata.json\n1\n", out); !ok {
		t.Errorf("agent's form: got %q", out)
	}
}

func TestRootImageVolumeAtECS(t *testing.T) {
	g := newRootGround(t, options{})
	build := g.command("build", "-q", "-t", "metad-test-ecs-volume", "-")
	build.Stdin = strings.NewReader("FROM " + testdocker.BusyboxImage + "\nVOLUME /ecs\n")
	build.Env = append(build.Env, "DOCKER_BUILDKIT=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	t.Cleanup(func() {
		_, _ = g.CLICommand("rmi", "-f", "metad-test-ecs-volume").CombinedOutput()
	})
	if out := g.docker("run", "--rm", "metad-test-ecs-volume", "sh", "-c",
		"grep -c ContainerID $ECS_CONTAINER_METADATA_FILE"); out != "1" {
		t.Errorf("got %s", out)
	}
}

// What Watchtower and Portainer do to upgrade a container: a new one is made with the old one's
// configuration, after the old one is removed or before. The new one has its own file and address.
func TestRootRecreate(t *testing.T) {
	for _, order := range []string{"remove, create", "rename, create, remove"} {
		t.Run(order, func(t *testing.T) {
			g := newRootGround(t, options{uris: true})
			id := g.start("--name", "upgraded")
			old := g.dir(id)
			g.until("READY", old, ready)
			in := g.Inspect(t, id)
			if order == "remove, create" {
				g.Remove(t, id)
				g.empty()
			} else if err := g.Client.ContainerRename(t.Context(), id,
				"upgraded-old"); err != nil {
				t.Fatal(err)
			}
			c := g.client()
			created, err := c.ContainerCreate(t.Context(), in.Config, in.HostConfig,
				nil, nil, "upgraded")
			if err == nil {
				t.Cleanup(func() {
					_, _ = g.CLICommand("rm", "-f", created.ID).CombinedOutput()
				})
				err = c.ContainerStart(t.Context(), created.ID,
					container.StartOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
			if order != "remove, create" {
				g.Remove(t, id)
			}
			dir := g.dir(created.ID)
			if dir == old && order != "remove, create" {
				t.Errorf("the new container has the old one's directory %s", dir)
			}
			g.until("READY", dir, func(d mdfile.Document) bool {
				return ready(d) && d.ContainerID == created.ID
			})
			out := g.Exec(t, created.ID, "sh", "-c",
				"cat $ECS_CONTAINER_METADATA_FILE; ls /ecs/metadata; env | grep "+
					"-c ECS_CONTAINER")
			if !strings.Contains(out, created.ID) ||
				!strings.HasSuffix(out, "upgraded\n3\n") {
				t.Errorf("in the new container: got %s", out)
			}
			for _, e := range g.Inspect(t, created.ID).Config.Env {
				if strings.HasPrefix(e, inject.EnvURI) &&
					slices.Contains(in.Config.Env, e) {
					t.Errorf("the new container has the old one's %s", e)
				}
			}
		})
	}
}

// The old form of a request, with HostConfig's members at the top, is the Engine's to judge: up to
// 24 it does what they say, through the proxy as without it.
func TestRootTopLevelHostConfig(t *testing.T) {
	g := newRootGround(t, options{uris: true})
	create := func(socket, name string) container.InspectResponse {
		t.Helper()
		c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context,
			_, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
		defer c.CloseIdleConnections()
		resp, err := c.Post("http://d/containers/create?name="+name, "application/json",
			strings.NewReader(`{"Image":"`+testdocker.BusyboxImage+
				`","Binds":["/tmp:/mnt"],"Privileged":true,"NetworkMode":"none"}`))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			t.Fatalf("create %s: %s", name, resp.Status)
		}
		t.Cleanup(func() { _, _ = g.CLICommand("rm", "-f", name).CombinedOutput() })
		return g.Inspect(t, name)
	}
	want, got := create(g.Socket, "straight").HostConfig, create(g.socket, "proxied").HostConfig
	if !slices.Equal(got.Binds, want.Binds) || got.Privileged != want.Privileged ||
		got.NetworkMode != want.NetworkMode {
		t.Errorf("got %v %v %v, want %v %v %v", got.Binds, got.Privileged, got.NetworkMode,
			want.Binds, want.Privileged, want.NetworkMode)
	}
}

// What compose does: a project's containers, with its labels, are one task with one directory; one
// that is replaced while it exists has a file from the start.
func TestRootComposeStyle(t *testing.T) {
	g := newRootGround(t, options{})
	g.docker("network", "create", "shop_default")
	t.Cleanup(func() { _, _ = g.CLICommand("network", "rm", "shop_default").CombinedOutput() })
	up := func(name, service string) string {
		return g.start("--name", name, "--network", "shop_default", "--network-alias",
			service,
			"--label", "com.docker.compose.project=shop", "--label",
			"com.docker.compose.service="+service)
	}
	web, db := up("shop-web-1", "web"), up("shop-db-1", "db")
	for id, service := range map[string]string{web: "web", db: "db"} {
		d := g.until("READY", g.dir(id), ready)
		if d.ContainerName != service || !strings.HasSuffix(d.TaskARN,
			":task/default/shop") || d.NetworkMode != "shop_default" {
			t.Errorf("%s: got %+v", service, d)
		}
		if got, want := g.dir(id), g.dataDir+"/metadata/default/shop/"+
			service; got != want {
			t.Errorf("directory: got %s, want %s", got, want)
		}
		if out := g.Exec(t, id, "sh", "-c",
			"echo $ECS_CONTAINER_METADATA_FILE"); out != "/ecs/metadata/"+service+
			"/metadata.json\n" {
			t.Errorf("variable: got %s", out)
		}
	}
	replaced := up("1234_shop-web-1", "web")
	g.docker("rm", "-f", "shop-web-1")
	g.until("READY", g.dir(replaced), ready)
	if out := g.Exec(t, replaced, "sh", "-c",
		"cat $ECS_CONTAINER_METADATA_FILE"); !strings.Contains(out, replaced) {
		t.Errorf("replaced: got %s", out)
	}
	g.docker("rm", "-f", replaced, db)
	g.empty()
}

// Names that cannot be directories, names that the Engine refuses or has already.
func TestRootNames(t *testing.T) {
	g := newRootGround(t, options{})
	long := strings.Repeat("n", 300)
	id := g.start("--name", long)
	if m := g.Inspect(t, id).Mounts; len(m) != 0 || g.warnings() != 1 {
		t.Errorf("300 characters: got %+v, %d warnings", m, g.warnings())
	}
	for _, name := range []string{"../../x", "a/b", "..", "größe"} {
		id := g.start("--label",
			"com.amazonaws.ecs.task-arn=arn:aws:ecs:x:1:task/default/names", "--label",
			"com.amazonaws.ecs.container-name="+name)
		if m := g.Inspect(t, id).Mounts; len(m) != 0 {
			t.Errorf("%s: got %+v", name, m)
		}
	}
	if n := g.warnings(); n != 5 {
		t.Errorf("got %d warnings", n)
	}
	g.empty()

	for _, bad := range []string{"../x", "a/b", "ü"} { // not a Docker name
		if out, err := g.command("create", "--name", bad,
			testdocker.BusyboxImage).CombinedOutput(); err == nil ||
			!strings.Contains(string(out), "Invalid container name") {
			t.Errorf("%s: got %v, %s", bad, err, out)
		}
	}
	if out, err := g.command("create", "metad-test:none").CombinedOutput(); err == nil {
		t.Errorf("no such image: got %s", out)
	}
	g.empty()
	g.start("--name", "same")
	if out, err := g.command("create", "--name", "same",
		testdocker.BusyboxImage).CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "is already in use") {
		t.Errorf("name in use: got %v, %s", err, out)
	}
	if dirs, _ := filepath.Glob(filepath.Join(g.dataDir,
		"metadata/*/*/same/metadata.json")); len(dirs) > 2 {
		t.Errorf("left behind: %v", dirs)
	}
	g.docker("rm", "-f", "same")
	g.empty()
}

// 100 creations at a time: every container has a file of its own.
func TestRootParallelCreates(t *testing.T) {
	g := newRootGround(t, options{})
	c := g.client()
	const n = 100
	ids := make([]string, n)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			resp, err := c.ContainerCreate(context.Background(),
				&container.Config{Image: testdocker.BusyboxImage},
				&container.HostConfig{NetworkMode: "none"}, nil, nil,
				fmt.Sprintf("parallel%d", i))
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = resp.ID
		})
	}
	wg.Wait()
	dirs := map[string]bool{}
	for _, id := range ids {
		if id != "" {
			t.Cleanup(func() {
				_ = c.ContainerRemove(context.Background(), id,
					container.RemoveOptions{Force: true})
			})
			dir := g.dir(id)
			dirs[dir] = true
			g.until("its id", dir, func(d mdfile.Document) bool {
				return d.ContainerID == id
			})
		}
	}
	if len(dirs) != n {
		t.Errorf("got %d directories", len(dirs))
	}
	for _, id := range ids {
		if id != "" {
			if err := c.ContainerRemove(context.Background(), id,
				container.RemoveOptions{Force: true}); err != nil {
				t.Error(err)
			}
		}
	}
	g.empty()
	if n := g.warnings(); n != 0 {
		t.Errorf("got %d warnings", n)
	}
}

// The Engine stops and comes back behind the proxy; files stay.
func TestRootEngineRestarts(t *testing.T) {
	g := newRootGround(t, options{})
	id := g.start("--name", "surviving")
	dir := g.dir(id)
	g.until("READY", dir, ready)
	g.StopDocker(t)
	if out, err := g.command("ps").CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "pass on to the Docker Engine") {
		t.Errorf("without the Engine: got %v, %s", err, out)
	}
	g.StartDocker(t)
	if out := g.docker("ps", "-q", "--no-trunc"); !strings.Contains(out, id) {
		t.Errorf("after the restart: got %s", out)
	}
	other := g.start()
	g.until("READY", g.dir(other), ready)
	if d := g.until("READY", dir, ready); d.ContainerID != id {
		t.Errorf("got %+v", d)
	}
}
