package docker

import (
	"encoding/json"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/go-connections/nat"

	"metad/pkg/task"
)

var testNames = newNaming("eu-west-1", "123456789012", "cl")

// recorded returns a real Engine's inspect of a container: running, exited, created, pause, app.
func recorded(t testing.TB, name string) *container.InspectResponse {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	inspect := &container.InspectResponse{}
	if err := json.Unmarshal(b, inspect); err != nil {
		t.Fatal(err)
	}
	return inspect
}

func described(t testing.TB, inspect *container.InspectResponse) *description {
	t.Helper()
	d, err := describe(inspect, testNames, nil, time.Unix(1700000000, 5).UTC())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// show gives a member of a description as JSON, for comparing.
func show(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func TestDescribe(t *testing.T) {
	type change = func(*container.InspectResponse)
	labels := func(kv ...string) change {
		return func(i *container.InspectResponse) {
			i.Config.Labels = map[string]string{}
			for n := 0; n < len(kv); n += 2 {
				i.Config.Labels[kv[n]] = kv[n+1]
			}
		}
	}
	const arn = "arn:aws:ecs:us-west-2:111122223333:task/default/rec"
	id := func(d *description) string {
		return strings.Join([]string{d.arn, d.id, d.cluster, d.family, d.revision}, " ")
	}
	for _, tt := range []struct {
		name   string
		file   string
		change change
		got    func(*description) any
		want   any
	}{
		{"M17 stopped with code 0", "exited", nil, func(d *description) any {
			return []any{d.container.KnownStatus, d.container.DesiredStatus,
				*d.container.ExitCode, d.container.FinishedAt.IsZero(), d.container.PID}
		}, []any{task.StatusStopped, task.StatusStopped, 0, false, 0}},
		{"M18 running", "running", func(i *container.InspectResponse) {
			i.State.FinishedAt = "2024-01-01T00:00:00Z"
		}, func(d *description) any {
			return []any{d.container.KnownStatus, d.container.DesiredStatus,
				d.container.ExitCode, d.container.FinishedAt, d.container.PID != 0}
		}, []any{task.StatusRunning, task.StatusRunning, (*int)(nil), time.Time{}, true}},
		{"created", "created", nil, func(d *description) any {
			return []any{d.container.KnownStatus, d.container.StartedAt,
				d.container.ExitCode, d.container.State}
		}, []any{task.StatusCreated, time.Time{}, (*int)(nil), "created"}},
		{"could not be started", "created", func(i *container.InspectResponse) {
			i.State.Error, i.State.ExitCode = "no such file", 127
		},
			func(d *description) any {
				return []any{d.container.KnownStatus,
					d.container.ExitCode}
			}, []any{task.StatusStopped, (*int)(nil)}},
		{"paused", "running", func(i *container.InspectResponse) {
			i.State.Paused, i.State.Status = true, "paused"
		},
			func(d *description) any {
				return []any{d.container.KnownStatus,
					d.container.State}
			}, []any{task.StatusRunning, "paused"}},
		{"restarting has no process", "running", func(i *container.InspectResponse) {
			i.State.Restarting, i.State.Pid = true, 0
		},
			func(d *description) any {
				return []any{d.container.KnownStatus,
					d.ownNetwork()}
			}, []any{task.StatusRunning, false}},
		{"times are UTC", "running", func(i *container.InspectResponse) {
			i.Created = "2024-01-02T05:04:05.5+02:00"
		},
			func(d *description) any { return d.container.CreatedAt },
			time.Date(2024, 1, 2, 3, 4, 5, 500000000, time.UTC)},
		{"M20 CPU unset, memory 50", "running", func(i *container.InspectResponse) {
			i.HostConfig.CPUShares = 0
		},
			func(d *description) any { return d.container.Limits },
			task.ContainerLimits{CPU: 2, Memory: 50}},
		{"M20 CPU 1", "running", func(i *container.InspectResponse) {
			i.HostConfig.CPUShares, i.HostConfig.Memory = 1, 0
		},
			func(d *description) any { return d.container.Limits },
			task.ContainerLimits{CPU: 2}},
		{"M21 CPU 10", "running", nil, func(d *description) any { return d.container.Limits }, task.ContainerLimits{CPU: 10, Memory: 50}},
		{"M22 DockerName", "running", nil, func(d *description) any { return d.container.DockerName + " " + d.container.Name }, "web web"},
		{"M26 ports are bindings", "running", nil, func(d *description) any {
			return show(d.container.Ports)
		},
			`[{"ContainerPort":53,"Protocol":"udp","HostPort":5353,"HostIP":"127.0.0.1"},` +
				`{"ContainerPort":80,"Protocol":"tcp","HostPort":8080,"HostIP":"0.0.0.0"},{"ContainerPort":80,"Protocol":"tcp","HostPort":8080,"HostIP":"::"}]`},
		{"M26 a binding without a number", "running", func(i *container.InspectResponse) {
			i.NetworkSettings.Ports = nat.PortMap{"80/tcp": {{HostPort: "x"},
				{HostPort: "70000"}, {HostPort: ""}}}
		}, func(d *description) any { return show(d.container.Ports) }, "null"},
		{"M27 labels", "app", nil, func(d *description) any {
			return show(d.container.Labels)
		},
			`{"com.amazonaws.ecs.cluster":"default","com.amazonaws.ecs.container-name":"app","com.amazonaws.ecs.task-arn":"` + arn + `",` +
				`"com.amazonaws.ecs.task-definition-family":"test","com.amazonaws.ecs.task-definition-version":"1"}`},
		{"M32 volumes", "running", nil, func(d *description) any {
			return show(d.container.Volumes)
		},
			`[{"DockerName":"data","Source":"/var/lib/docker/volumes/data/_data","Destination":"/data"},{"DockerName":"","Source":"/tmp","Destination":"/ecs"}]`},
		{"networks", "running", nil, func(d *description) any {
			return show(d.container.DockerNetworks)
		},
			`[{"Name":"bridge","IPAddress":"172.17.0.2","IPv6Address":"","Gateway":"172.17.0.1","IPv6Gateway":"","MAC":"02:42:ac:11:00:02",` +
				`"Subnet":"172.17.0.0/16","IPv6Subnet":"","SubnetGateway":"172.17.0.1/16","IPv6SubnetGateway":"","DNSServers":null,"DNSSearch":null,"DNSName":""}]`},
		{"image", "running", nil, func(d *description) any { return d.container.Image + " " + d.container.ImageID[:10] }, "metad-test:latest sha256:501"},

		{"v3 endpoint id", "app", func(i *container.InspectResponse) {
			i.Config.Env = append(i.Config.Env,
				"ECS_CONTAINER_METADATA_URI=http://169.254.170.2/v3/6f6a-1")
		}, func(d *description) any { return d.container.EndpointID }, "6f6a-1"},
		{"v4 endpoint id", "app", func(i *container.InspectResponse) {
			i.Config.Env = append(i.Config.Env, "ECS_CONTAINER_METADATA_URI=",
				"ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/6f6a-2")
		}, func(d *description) any { return d.container.EndpointID }, "6f6a-2"},
		{"no endpoint id", "app", func(i *container.InspectResponse) {
			i.Config.Env = append(i.Config.Env,
				"ECS_CONTAINER_METADATA_URI=http://x/v3/..")
		}, func(d *description) any { return d.container.EndpointID }, ""},

		{"M13 pause", "pause", nil, func(d *description) any {
			return []any{d.container.Type, d.container.Name, d.container.ImageID,
				d.container.DesiredStatus, d.awaitsCNI(), d.container.Limits}
		}, []any{task.TypeCNIPause, "~internal~ecs~pause", "",
			task.StatusResourcesProvisioned, true, task.ContainerLimits{CPU: 2}}},
		{"app of an awsvpc task", "app", nil, func(d *description) any {
			return []any{d.container.Type, d.container.Name, d.ownNetwork(), id(d)}
		}, []any{task.TypeNormal, "app", false, arn + " rec default test 1"}},
		{"Service Connect pause", "app", labels(task.LabelTaskARN, arn,
			task.LabelContainerName, "~internal~ecs~pause-app"),
			func(d *description) any { return d.container.Type }, task.TypeCNIPause},
		{"namespace pause", "app", labels(task.LabelTaskARN, arn, task.LabelContainerName,
			"~internal~ecs~pause~namespace"),
			func(d *description) any { return d.container.Type },
			task.TypeNamespacePause},
		{"volumes container", "app", labels(task.LabelTaskARN, arn, task.LabelContainerName,
			"~internal~ecs-emptyvolume-source"),
			func(d *description) any { return d.container.Type },
			task.TypeEmptyHostVolume},
		{"host network", "running", func(i *container.InspectResponse) {
			i.HostConfig.NetworkMode = "host"
		},
			func(d *description) any { return d.ownNetwork() }, false},

		{"old ARN", "app", labels(task.LabelTaskARN,
			"arn:aws-cn:ecs:cn-north-1:1:task/old-id", task.LabelContainerName, "a"),
			func(d *description) any { return id(d) },
			"arn:aws-cn:ecs:cn-north-1:1:task/old-id old-id cl  1"},
		{"Compose", "running", labels(labelComposeProject, "shop", labelComposeService,
			"db"), func(d *description) any { return id(d) + " " + d.container.Name },
			"arn:aws:ecs:eu-west-1:123456789012:task/cl/shop shop cl shop 1 db"},
		{"ECS before Compose", "running", labels(labelComposeProject, "shop",
			labelComposeService, "db", task.LabelTaskARN, arn, task.LabelContainerName,
			"a"),
			func(d *description) any { return d.arn }, arn},
		{"alone", "running", nil, func(d *description) any { return id(d) },
			"arn:aws:ecs:eu-west-1:123456789012:task/cl/c05cda6bc9568730d8d0eaa724dcfdb4 c05cda6bc9568730d8d0eaa724dcfdb4 cl web 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inspect := recorded(t, tt.file)
			if tt.change != nil {
				tt.change(inspect)
			}
			d := described(t, inspect)
			if got := tt.got(d); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
			if d.labelErr != nil {
				t.Errorf("labels not believed: %v", d.labelErr)
			}
		})
	}
}

// TestDescribeHostileLabels: such a container is a task of its own.
func TestDescribeHostileLabels(t *testing.T) {
	alone := described(t, recorded(t, "running")).identity
	ecs := func(arn, name string) map[string]string {
		return map[string]string{task.LabelTaskARN: arn, task.LabelContainerName: name}
	}
	const good = "arn:aws:ecs:r:1:task/c/id"
	for _, labels := range []map[string]string{
		ecs("", "a"),
		ecs("id", "a"),
		ecs("arn:aws:ecs:r:1:service/c/id", "a"),
		ecs("arn:aws:s3:r:1:task/c/id", "a"),
		ecs("arn:aws:ecs:r:1:task/c/..", "a"),
		ecs("arn:aws:ecs:r:1:task/../id", "a"),
		ecs("arn:aws:ecs:r:1:task/c/", "a"),
		ecs("arn:aws:ecs:r:1:task/c/x/id", "a"),
		ecs("arn:aws:ecs:r:1:task/c/a\x00b", "a"),
		ecs("arn:aws:ecs:r\n:1:task/c/id", "a"),
		ecs("arn:aws:ecs:r:1:task/c/id:x", "a"),
		ecs("arn:aws:ecs:r:1:task/c/"+strings.Repeat("x", 1<<20), "a"),
		ecs(good, ""),
		ecs(good, "a\x00b"),
		ecs(good, "a\xffb"),
		ecs(good, strings.Repeat("x", 256)),
		{labelComposeProject: "", labelComposeService: "a"},
		{labelComposeProject: "../x", labelComposeService: "a"},
		{labelComposeProject: "x:y", labelComposeService: "a"},
		{labelComposeProject: "x", labelComposeService: ""},
		{labelComposeProject: "x", labelComposeService: "a\nb"},
	} {
		inspect := recorded(t, "running")
		inspect.Config.Labels = labels
		d := described(t, inspect)
		if d.identity != alone || d.container.Name != "web" ||
			d.container.Type != task.TypeNormal {
			t.Errorf("%s: got %+v, want %+v", quote(show(labels)), d.identity, alone)
		}
		if d.labelErr == nil || len(d.labelErr.Error()) > 600 ||
			strings.ContainsAny(d.labelErr.Error(), "\x00\n") {
			t.Errorf("%s: warning %v", quote(show(labels)), d.labelErr)
		}
	}
	inspect := recorded(t, "running")
	inspect.Config.Labels = map[string]string{task.LabelTaskARN: good,
		task.LabelContainerName: "a", task.LabelRevision: "7\x00"}
	if d := described(t, inspect); d.revision != "1" {
		t.Errorf("revision: got %q", d.revision)
	}
	inspect.Config.Labels = nil
	inspect.Name = "/né:w"
	if d := described(t, inspect); d.family != "n__w" {
		t.Errorf("family: got %q", d.family)
	}
}

func TestDescribeIncomplete(t *testing.T) {
	for _, text := range []string{`{}`, `{"Id":"x"}`, `{"State":{}}`} {
		inspect := &container.InspectResponse{}
		if err := json.Unmarshal([]byte(text), inspect); err != nil {
			t.Fatal(err)
		}
		if d, err := describe(inspect, testNames, nil, time.Now()); err == nil {
			t.Errorf("%s: got %+v, want an error", text, d)
		}
	}
	inspect := &container.InspectResponse{}
	if err := json.Unmarshal([]byte(`{"Id":"x","State":{"Running":true,"Pid":1}}`),
		inspect); err != nil {
		t.Fatal(err)
	}
	if d := described(t, inspect); d.id != "x" || !d.ownNetwork() {
		t.Errorf("got %+v", d)
	}
}

// M29, M30, M31.
func TestHealthAfter(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0).UTC() }
	verdict := func(status string, code int, output string) *container.Health {
		return &container.Health{Status: status,
			Log: []*container.HealthcheckResult{{ExitCode: 9},
				{ExitCode: code, Output: output}}}
	}
	f := func(before *task.Health, h *container.Health, want *task.Health) {
		t.Helper()
		if got := healthAfter(before, h, at(100)); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	healthy := &task.Health{Status: "HEALTHY", Since: at(50), Output: "hello\n"}
	f(nil, nil, nil)                                                                                 // no health check
	f(nil, &container.Health{Status: "none"}, nil)                                                   // switched off
	f(nil, verdict("healthy", 2, "x"), &task.Health{Status: "HEALTHY", Since: at(100), Output: "x"}) // a code is a failure's
	f(nil, verdict("starting", 1, "x"), &task.Health{})                                              // no verdict yet
	f(&task.Health{}, verdict("healthy", 0, "hello\n"), &task.Health{Status: "HEALTHY", Since: at(100), Output: "hello\n"})
	f(healthy, verdict("healthy", 0, "other"), healthy)  // no change: noted once
	f(healthy, verdict("starting", 0, "other"), healthy) // restarted: nothing is recorded
	f(healthy, verdict("unhealthy", 3, "bad"), &task.Health{Status: "UNHEALTHY", Since: at(100), ExitCode: 3, Output: "bad"})
	f(healthy, &container.Health{Status: "unhealthy"}, &task.Health{Status: "UNHEALTHY", Since: at(100)})
	// Known from before metad was started: the log says since when.
	checks := func(status string, codes ...int) *container.Health {
		h := &container.Health{Status: status}
		for i, code := range codes {
			h.Log = append(h.Log, &container.HealthcheckResult{End: at(int64(10 * i)),
				ExitCode: code, Output: "x"})
		}
		return h
	}
	f(nil, checks("healthy", 1, 0, 0, 0), &task.Health{Status: "HEALTHY", Since: at(10), Output: "x"})
	f(&task.Health{}, checks("unhealthy", 0, 0, 1, 1, 1), &task.Health{Status: "UNHEALTHY", Since: at(20), ExitCode: 1, Output: "x"})
	f(healthy, checks("unhealthy", 0, 1, 1, 1), &task.Health{Status: "UNHEALTHY", Since: at(100), ExitCode: 1, Output: "x"})
	f(nil, verdict("healthy", 0, strings.Repeat("é", 1000)), &task.Health{Status: "HEALTHY", Since: at(100), Output: strings.Repeat("é", 512)})
	f(nil, verdict("healthy", 0, "x"+strings.Repeat("é", 1000)), &task.Health{Status: "HEALTHY", Since: at(100), Output: "x" + strings.Repeat("é", 511)})
}

// group makes a follower's containers of descriptions, in the order given.
func group(t testing.TB, list ...*description) map[string]*tracked {
	t.Helper()
	g := map[string]*tracked{}
	for i, d := range list {
		d.container.ID += string(rune('a' + i))
		d.container.CreatedAt = d.container.CreatedAt.Add(time.Duration(i) * time.Second)
		g[d.container.ID] = &tracked{id: d.container.ID, stats: &task.StatsCell{}, desc: d,
			home: d.identity}
	}
	return g
}

func testFollower(t testing.TB) *state {
	t.Helper()
	f, err := newFollower(Config{Engine: fakeEngine{}, Log: testLog(t),
		Apply: func([]*task.Task) {}, AvailabilityZone: "eu-west-1a"})
	if err != nil {
		t.Fatal(err)
	}
	return f.state
}

func TestBuildAwsvpc(t *testing.T) {
	pause, app := described(t, recorded(t, "pause")), described(t, recorded(t, "app"))
	app.container.Ports = []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 8080}}
	g := group(t, pause, app)
	ep := task.Endpoint{Addr: netip.MustParseAddr("169.254.172.2"), Ifindex: 9, MAC: [6]byte{1}}
	of := func(d *description, ep task.Endpoint) task.Endpoint {
		ep.Container = d.container.ID
		return ep
	}
	f := testFollower(t)

	tk := f.build(g)
	if p := tk.Pause(); p.KnownStatus != task.StatusRunning || p.Networks != nil ||
		len(tk.Endpoints) != 0 {
		t.Errorf("before CNI: got %+v", p)
	}
	g[pause.container.ID].ns = &namespace{endpoints: []task.Endpoint{ep}, ecs: true}
	tk = f.build(g)
	if tk.Containers[1].Networks != nil || tk.Containers[1].Ports[0].HostPort != 8080 {
		t.Errorf("no ENI: got %+v", tk.Containers[1])
	}

	g[pause.container.ID].ns.eni4 = []string{"10.0.0.5", "10.0.0.6"}
	g[pause.container.ID].ns.details = task.NetworkDetails{MAC: "02:00:00:00:00:01",
		Subnet: "10.0.0.0/24", SubnetGateway: "10.0.0.1/24"}
	pause.dns = task.NetworkDetails{DNSName: "ip-10-0-0-5.ec2.internal",
		DNSServers: []string{"10.0.0.2"}, DNSSearch: []string{"ec2.internal"}}
	details := task.NetworkDetails{MAC: "02:00:00:00:00:01", Subnet: "10.0.0.0/24",
		SubnetGateway: "10.0.0.1/24",
		DNSName:       "ip-10-0-0-5.ec2.internal", DNSServers: []string{"10.0.0.2"},
		DNSSearch: []string{"ec2.internal"}}
	tk = f.build(g)
	// M12, M13, M23, M24, M25
	if len(tk.Containers) != 2 ||
		tk.Containers[0].KnownStatus != task.StatusResourcesProvisioned ||
		!reflect.DeepEqual(tk.Endpoints, []task.Endpoint{of(pause, ep)}) {
		t.Errorf("got %+v", tk)
	}
	for _, c := range tk.Containers {
		if want := []task.Network{{Mode: "awsvpc", IPv4Addresses: []string{"10.0.0.5",
			"10.0.0.6"}, NetworkDetails: details}}; !reflect.DeepEqual(c.Networks, want) {
			t.Errorf("%s: networks %+v, want %+v", c.Name, c.Networks, want)
		}
	}
	if got := tk.Containers[1].Ports[0].HostPort; got != 80 {
		t.Errorf("host port with an ENI: got %d", got)
	}
	if app.container.Ports[0].HostPort != 8080 {
		t.Error("build has changed what it was given")
	}
	if tk.AvailabilityZone != "eu-west-1a" {
		t.Errorf("zone %q", tk.AvailabilityZone)
	}
}

func TestTaskStatus(t *testing.T) {
	f := func(want task.Status, containers ...*task.Container) {
		t.Helper()
		if got := taskStatus(containers); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	c := func(s task.Status) *task.Container {
		return &task.Container{Type: task.TypeNormal, KnownStatus: s}
	}
	pause := func(s task.Status) *task.Container {
		return &task.Container{Type: task.TypeCNIPause, KnownStatus: s}
	}
	f(task.StatusRunning, c(task.StatusRunning))
	f(task.StatusCreated, c(task.StatusRunning), c(task.StatusCreated))
	f(task.StatusRunning, c(task.StatusRunning), c(task.StatusStopped))
	f(task.StatusStopped, c(task.StatusStopped), c(task.StatusStopped))
	f(task.StatusRunning, pause(task.StatusResourcesProvisioned), c(task.StatusRunning))
	f(task.StatusStopped, pause(task.StatusResourcesProvisioned), c(task.StatusStopped))
	f(task.StatusNone, pause(task.StatusResourcesProvisioned))
	f(task.StatusStopped, pause(task.StatusStopped))
}

func TestKeep(t *testing.T) {
	f := testFollower(t)
	a, b := described(t, recorded(t, "running")), described(t, recorded(t, "exited"))
	g := group(t, a, b)
	old := f.build(g)
	if keep(old, f.build(g)) != old {
		t.Error("an unchanged task has another pointer")
	}
	changed := *b
	changed.container.DockerName = "other"
	g[b.container.ID].desc = &changed
	next := keep(old, f.build(g))
	if next == old {
		t.Fatal("a changed task has the same pointer")
	}
	if next.Containers[0] != old.Containers[0] || next.Containers[1] == old.Containers[1] ||
		next.Containers[1].Stats != old.Containers[1].Stats {
		t.Error("pointers: want the first container's kept, the second's new with the " +
			"old cell")
	}
}
