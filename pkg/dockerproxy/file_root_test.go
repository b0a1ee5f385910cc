//go:build root

package dockerproxy

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/internal/testdocker"
	"metad/pkg/inject"
	"metad/pkg/mdfile"
	"metad/pkg/task"
)

// Proposal 001, the steps one by one with the docker command. F05: the container itself finds its
// file by the variable, cannot change it, and reads the right network facts in it.
func TestRootF05ContainerReadsItsFile(t *testing.T) {
	g := newRootGround(t, options{})
	const name = "reader"
	g.docker("create", "--name", name, "--stop-signal", "KILL", "-p", "127.0.0.1:18080:80",
		testdocker.BusyboxImage)
	t.Cleanup(func() { _, _ = g.CLICommand("rm", "-f", name).CombinedOutput() })
	inspect := g.Inspect(t, name)
	dir := g.dir(name)
	basic := g.until("basic facts", dir, func(d mdfile.Document) bool {
		return d.ContainerID != ""
	})
	if basic.Status != "created" || basic.ContainerID != inspect.ID ||
		basic.ImageName != testdocker.BusyboxImage ||
		basic.MetadataFileStatus != "" || basic.Networks != nil { // F04
		t.Errorf("after creation: got %+v", basic)
	}

	g.docker("start", name)
	started := time.Now()
	// As an entrypoint would: by the variable, until READY.
	text := g.docker("exec", name, "sh", "-c",
		`until grep -q '"MetadataFileStatus": "READY"' "$ECS_CONTAINER_METADATA_FILE"; do usleep 5000; done; cat "$ECS_CONTAINER_METADATA_FILE"`)
	t.Logf("READY and read %v after docker start returned (an exec included)",
		time.Since(started).Round(time.Millisecond))
	var d mdfile.Document
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	inspect = g.Inspect(t, name)
	bridge := inspect.NetworkSettings.Networks["bridge"]
	addr := g.Exec(t, name, "sh", "-c",
		"ip -4 -o addr show eth0 | awk '{print $4}' | cut -d/ -f1; ip route | awk "+
			"'/default/ {print $3}'")
	if got := d.IPAddress + "\n" + d.Gateway + "\n"; got != addr ||
		d.IPAddress != bridge.IPAddress || d.NetworkMode != "bridge" {
		t.Errorf("network facts: got %+v, the container has %q", d, addr)
	}
	wantPort := mdfile.PortMapping{ContainerPort: 80, HostPort: 18080, BindIP: "127.0.0.1",
		Protocol: "tcp", BindIPProposal: "127.0.0.1"}
	if !slices.Equal(d.PortMappings, []mdfile.PortMapping{wantPort}) {
		t.Errorf("ports: got %+v", d.PortMappings)
	}
	if len(d.Networks) != 1 || d.Networks[0].NetworkMode != "bridge" ||
		d.Networks[0].IPv4Addresses[0] != bridge.IPAddress {
		t.Errorf("networks: got %+v", d.Networks)
	}
	// F09
	if d.ContainerID != inspect.ID || d.ImageID != inspect.Image ||
		d.DockerContainerName != "/"+name || d.Status != "running" ||
		d.TaskARN == "" || d.HostPrivateIPv4Address != "10.0.0.1" {
		t.Errorf("got %+v", d)
	}

	env := g.Exec(t, name, "sh", "-c",
		"echo $ECS_CONTAINER_METADATA_FILE; stat -c '%a %u' $ECS_CONTAINER_METADATA_FILE")
	if env != "/ecs/metadata/reader/metadata.json\n644 0\n" { // F07
		t.Errorf("in the container: got %q", env)
	}
	for _, try := range []string{"echo x > $F", "echo x >> $F", "rm $F", "mv $F $F.old",
		"touch $(dirname $F)/new", "mkdir $(dirname $F)/sub", "chmod 777 $F"} {
		if out, code, err := g.TryExec(name, "sh", "-c", "F=$ECS_CONTAINER_METADATA_FILE; "+
			try); code == 0 || err != nil ||
			!strings.Contains(out, "Read-only file system") {
			t.Errorf("%s: got code %d, %v: %s", try, code, err, out)
		}
	}

	// By the agent's name as well, by any user, and from the host by task id and container
	// name.
	if out := g.Exec(t, name, "su", "-s", "/bin/sh", "nobody", "-c",
		"cat /ecs/metadata/reader/"+mdfile.AgentFileName); out != text {
		t.Errorf("as nobody: got %s", out)
	}
	id := d.TaskARN[strings.LastIndexByte(d.TaskARN, '/')+1:]
	onHost, err := os.ReadFile(filepath.Join(g.dataDir, "metadata", "default", id, name,
		mdfile.FileName))
	if err != nil || string(onHost) != text {
		t.Errorf("on the host: got %v, %s", err, onHost)
	}

	g.docker("rm", "-f", name)
	g.empty()
}

// The file follows the container's life: other networks, another name, stop, restart, and the mount
// still shows the new versions.
func TestRootFileFollowsChanges(t *testing.T) {
	g := newRootGround(t, options{})
	id := g.start("--name", "changing")
	dir := g.dir(id)
	first := g.until("READY", dir, ready)

	g.docker("network", "create", "changing-net")
	t.Cleanup(func() { _, _ = g.CLICommand("network", "rm", "changing-net").CombinedOutput() })
	g.docker("network", "connect", "changing-net", "changing")
	addr := g.Inspect(t, id).NetworkSettings.Networks["changing-net"].IPAddress
	d := g.until("second network", dir, func(d mdfile.Document) bool {
		return len(d.Networks) == 2 && ready(d)
	})
	if d.Networks[1].NetworkMode != "changing-net" || d.Networks[1].IPv4Addresses[0] != addr ||
		d.IPAddress != first.IPAddress {
		t.Errorf("two networks: got %+v", d)
	}
	g.docker("network", "disconnect", "bridge", "changing")
	d = g.until("first network gone", dir, func(d mdfile.Document) bool {
		return len(d.Networks) == 1
	})
	if d.IPAddress != addr {
		t.Errorf("other network: got %+v", d)
	}

	g.docker("rename", "changing", "changed")
	g.until("new name", dir, func(d mdfile.Document) bool {
		return d.DockerContainerName == "/changed"
	})
	if _, err := os.Stat(filepath.Join(g.dataDir, "metadata", "default", id[:32], "changed",
		mdfile.FileName)); err != nil {
		t.Error(err)
	}
	g.docker("pause", "changed")
	g.until("paused", dir, func(d mdfile.Document) bool {
		return d.Status == "paused" && ready(d)
	})
	g.docker("unpause", "changed")

	g.docker("stop", "changed")
	g.until("not READY", dir, func(d mdfile.Document) bool {
		return d.Status == "exited" && !ready(d) && d.IPAddress == ""
	})
	g.docker("start", "changed")
	g.until("READY again", dir, func(d mdfile.Document) bool {
		return ready(d) && d.IPAddress == addr
	})
	if out := g.Exec(t, id, "cat", "/ecs/metadata/changing/metadata.json"); !strings.Contains(
		out, `"DockerContainerName": "/changed"`) {
		t.Errorf("in the container: got %s", out)
	}
	g.docker("restart", "changed")
	g.until("READY after restart", dir, func(d mdfile.Document) bool {
		return ready(d) && d.Status == "running"
	})
	g.docker("rm", "-f", "changed")
	g.empty()
}

// F06, from inside a container: neither half a file nor none, by either name, through 1,000
// versions.
func TestRootF06ReaderInContainer(t *testing.T) {
	g := newRootGround(t, options{})
	id := g.start("--name", "looping")
	dir := g.dir(id)
	g.until("READY", dir, ready)
	type result struct {
		out  string
		code int
		err  error
	}
	done := make(chan result, 1)
	go func() {
		out, code, err := g.TryExec(id, "sh", "-c", `cd /ecs/metadata/looping; n=0
			while [ ! -e /tmp/stop ]; do for f in metadata.json ecs-container-metadata.json; do
				t=$(cat $f) || echo "missing $n"
				case $t in '{'*'"LastUpdatedAt": "'[0-9]*'"'*'}') ;; *) echo "bad $n: $t";; esac
				n=$((n+1))
			done; done; echo "$n reads"`)
		done <- result{out, code, err}
	}()
	g.wait("the reader has begun", func() bool {
		_, code, _ := g.TryExec(id, "sh", "-c", "ps | grep -q '[w]hile'")
		return code == 0
	})
	host := mdfile.Host{PrivateIPv4Address: "10.0.0.1"}
	for n := range 1000 {
		host.PublicIPv4Address = strings.Repeat("1", n%300)
		g.files.SetHost(host)
		g.reapply()
	}
	g.Exec(t, id, "touch", "/tmp/stop")
	r := <-done
	if r.err != nil || r.code != 0 || strings.Count(r.out, "\n") != 1 ||
		!strings.HasSuffix(r.out, " reads\n") {
		t.Errorf("got code %d, %v: %.2000s", r.code, r.err, r.out)
	}
	t.Logf("the container made %s", strings.TrimSpace(r.out))
}

// What scripts do with grep and sed where there is no jq.
func TestRootGrepAndSed(t *testing.T) {
	g := newRootGround(t, options{})
	const arn = "arn:aws:ecs:us-west-2:111122223333:task/default/grepsed"
	id := g.start("--label", "com.amazonaws.ecs.task-arn="+arn, "--label",
		"com.amazonaws.ecs.container-name=app",
		"--label", "com.amazonaws.ecs.cluster=default", "--label",
		"com.amazonaws.ecs.task-definition-family=web",
		"--label", "com.amazonaws.ecs.task-definition-version=7")
	if dir := g.dir(id); dir != g.dataDir+"/metadata/default/grepsed/app" { // F13
		t.Errorf("directory: got %s", dir)
	}
	g.until("READY", g.dir(id), ready)
	inspect := g.Inspect(t, id)
	f := func(script, want string) {
		t.Helper()
		if got := strings.TrimSuffix(g.Exec(t, id, "sh", "-c",
			"F=$ECS_CONTAINER_METADATA_FILE; "+script), "\n"); got != want {
			t.Errorf("%s: got %q, want %q", script, got, want)
		}
	}
	const value = ` "$F" | sed 's/.*: "\(.*\)",/\1/g'`
	f("grep ContainerID"+value, id)
	f("grep TaskARN"+value, arn)
	f("grep TaskDefinitionFamily"+value, "web")
	f("grep TaskDefinitionRevision"+value, "7")
	f("grep DockerContainerName"+value, inspect.Name)
	f(`grep '"ContainerName"'`+value, "app")
	f("grep ImageID"+value, inspect.Image)
	f("grep ImageName"+value, testdocker.BusyboxImage)
	f("grep MetadataFileStatus"+value, "READY")
	f("grep -m1 Cluster"+value, "default") // ClusterArn comes later
	f("grep HostPrivateIPv4Address"+value, "10.0.0.1")
	f(`grep -A1 IPv4Addresses "$F" | tail -n1 | tr -d '\t" '`, inspect.NetworkSettings.Networks["bridge"].IPAddress)
	f("grep '\"IPAddress\"'"+value, inspect.NetworkSettings.Networks["bridge"].IPAddress)
	f(`awk -F'"' '/"ContainerID"/ {print $4}' "$F"`, id)
	f(`basename "$(grep TaskARN`+value+`)"`, "grepsed")
}

// Proposal 001, second diagram: a container with --volumes-from has both files, each under its own
// path, and the variable names its own. The first's container and task are not mixed up with it.
func TestRootVolumesFrom(t *testing.T) {
	g := newRootGround(t, options{})
	c1 := g.start("--name", "c1")
	c2 := g.start("--name", "c2", "--volumes-from", "c1")
	c3 := g.start("--name", "c3")
	for _, id := range []string{c1, c3} {
		g.until("READY", g.dir(id), ready)
	}
	list := func(id string) string {
		return g.Exec(t, id, "sh", "-c",
			"echo $ECS_CONTAINER_METADATA_FILE; ls /ecs/metadata")
	}
	for id, want := range map[string]string{
		c1: "/ecs/metadata/c1/metadata.json\nc1\n",
		c2: "/ecs/metadata/c2/metadata.json\nc1\nc2\n",
		c3: "/ecs/metadata/c3/metadata.json\nc3\n",
	} {
		if got := list(id); got != want {
			t.Errorf("%s: got %q, want %q", id[:4], got, want)
		}
	}
	g.wait("c2's own file", func() bool {
		out, _, _ := g.TryExec(c2, "cat", "/ecs/metadata/c2/metadata.json")
		return strings.Contains(out, `"ContainerID": "`+c2+`"`) &&
			strings.Contains(out, "READY")
	})
	if out := g.Exec(t, c2, "cat", "/ecs/metadata/c1/metadata.json"); !strings.Contains(out,
		`"ContainerID": "`+c1+`"`) {
		t.Errorf("c1's file in c2: got %s", out)
	}
	if out, code, _ := g.TryExec(c2, "touch", "/ecs/metadata/c1/x"); code == 0 {
		t.Errorf("c2 can write to c1's directory: %s", out)
	}
	g.docker("rm", "-f", "c1", "c2", "c3")
	g.empty()
}

// F17: metad restarts: files are brought up to date, what happened meanwhile included. metad died
// between directory and container: the directory goes. Containers that went meanwhile: theirs too.
func TestRootF17Restart(t *testing.T) {
	g := newRootGround(t, options{})
	id, gone := g.start("--name", "staying"), g.start("--name", "going")
	dir := g.dir(id)
	g.until("READY", dir, ready)
	g.until("READY", g.dir(gone), ready)
	client := g.client()
	created, err := client.ContainerCreate(context.Background(),
		&container.Config{Image: testdocker.BusyboxImage}, nil, nil, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = g.CLICommand("rm", "-f", created.ID).CombinedOutput() })
	orphan := reserveAndDie(t, g.dataDir)
	g.stop()
	g.CLI(t, "rename", "staying", "stayed")
	g.CLI(t, "rm", "-f", "going")
	g.CLI(t, "start", created.ID)

	old := time.Now().Add(-2 * time.Minute) // metad was down for a while
	_ = filepath.WalkDir(g.dataDir, func(p string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Chtimes(p, old, old)
		}
		return err
	})
	again := newRootGround(t, options{dataDir: g.dataDir})
	again.until("new name", dir, func(d mdfile.Document) bool {
		return d.DockerContainerName == "/stayed" && ready(d)
	})
	again.until("READY", again.dir(created.ID), ready)
	again.wait("orphans gone", func() bool {
		_, err1 := os.Stat(orphan)
		_, err2 := os.Stat(filepath.Join(g.dataDir, "metadata/default", gone[:32]))
		return os.IsNotExist(err1) && os.IsNotExist(err2)
	})
	g.CLI(t, "rm", "-f", "stayed", created.ID)
	again.empty()
}

// reserveAndDie leaves what a metad leaves that dies before the Engine is asked.
func reserveAndDie(t *testing.T, dataDir string) (dir string) {
	t.Helper()
	w, err := mdfile.NewWriter(mdfile.Config{Layout: mdfile.Layout{DataDir: dataDir}},
		zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	e, err := w.Reserve(&task.Task{}, &task.Container{Name: "orphan", State: "created"},
		mdfile.FormProposal, strings.Repeat("0", 32))
	if err != nil {
		t.Fatal(err)
	}
	return e.HostDir
}

// The disk is full, or read-only: the container is created and runs, without its file and with one
// warning; nothing is left behind. Files that are there stay whole, and catch up.
func TestRootDiskFullAndReadOnly(t *testing.T) {
	dataDir := t.TempDir()
	if err := unix.Mount("tmpfs", dataDir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dataDir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	g := newRootGround(t, options{dataDir: dataDir})
	before := g.docker("create", "--name", "before", "--stop-signal", "KILL",
		testdocker.BusyboxImage)
	t.Cleanup(func() { _, _ = g.CLICommand("rm", "-f", before).CombinedOutput() })
	dir := g.dir(before)
	g.until("basic facts", dir, func(d mdfile.Document) bool { return d.ImageID != "" })
	whole, err := os.ReadFile(filepath.Join(dir, mdfile.FileName))
	if err != nil {
		t.Fatal(err)
	}

	fill := filepath.Join(dataDir, "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o644); err == nil {
		t.Fatal("the disk is not full")
	}
	without := func(what string, warnings int) {
		t.Helper()
		id := g.start()
		if m := g.Inspect(t, id).Mounts; len(m) != 0 {
			t.Errorf("%s: got %+v", what, m)
		}
		if n := g.warnings(); n != warnings {
			t.Errorf("%s: got %d warnings, want %d: %v", what, n, warnings,
				g.logs.All())
		}
		// before's directory and alias
		if list, _ := os.ReadDir(filepath.Join(dataDir, "metadata", "default")); len(
			list) > 2 {
			t.Errorf("%s: left behind: %v", what, list)
		}
	}
	without("disk full", 1)
	g.docker("start", "before")
	g.wait("a failed write", func() bool {
		return g.logs.FilterMessage("metadata file not written").Len() == 1
	})
	if now, err := os.ReadFile(filepath.Join(dir, mdfile.FileName)); err != nil ||
		string(now) != string(whole) {
		t.Errorf("the old text is not whole: %v: %s", err, now)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	g.files.Retry()
	g.until("READY", dir, ready)

	if err := unix.Mount("", dataDir, "", unix.MS_REMOUNT|unix.MS_RDONLY,
		"size=256k"); err != nil {
		t.Fatal(err)
	}
	without("read-only", 2)
	if err := unix.Mount("", dataDir, "", unix.MS_REMOUNT, "size=256k"); err != nil {
		t.Fatal(err)
	}
}

// F03 and F01 with a real Engine: pause containers have nothing, nor has anyone while it is off.
func TestRootF01F03Nothing(t *testing.T) {
	g := newRootGround(t, options{disabled: true})
	none := func(what, id string) {
		t.Helper()
		inspect := g.Inspect(t, id)
		if len(inspect.Mounts) != 0 || slices.ContainsFunc(inspect.Config.Env,
			func(e string) bool { return strings.HasPrefix(e, mdfile.EnvVar) }) {
			t.Errorf("%s: got %+v, %q", what, inspect.Mounts, inspect.Config.Env)
		}
		g.empty()
	}
	none("off", g.start())
	on := g.start("--label", inject.LabelFile+"=true")
	g.until("READY", g.dir(on), ready)
	g.docker("rm", "-f", on)
	none("pause", g.start("--label", inject.LabelFile+"=true", "--label",
		"com.amazonaws.ecs.container-name=~internal~ecs~pause",
		"--label", "com.amazonaws.ecs.task-arn=arn:aws:ecs:x:1:task/default/pause"))
}
