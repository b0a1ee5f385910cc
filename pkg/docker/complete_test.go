package docker

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"

	"metad/pkg/task"
)

// What only v4 shows of a container comes from its inspect.
func TestDescribeForV4(t *testing.T) {
	f := func(name string, change func(*container.InspectResponse), got func(*description) any,
		want any) {
		t.Helper()
		inspect := recorded(t, "running")
		change(inspect)
		if g := got(described(t, inspect)); !reflect.DeepEqual(g, want) {
			t.Errorf("%s: got %v, want %v", name, g, want)
		}
	}
	log := func(driver string, kv ...string) func(*container.InspectResponse) {
		return func(i *container.InspectResponse) {
			i.HostConfig.LogConfig = container.LogConfig{Type: driver,
				Config: map[string]string{}}
			for n := 0; n < len(kv); n += 2 {
				i.HostConfig.LogConfig.Config[kv[n]] = kv[n+1]
			}
		}
	}
	logging := func(d *description) any {
		return d.container.LogDriver + " " + show(d.container.LogOptions)
	}
	id := recorded(t, "running").ID
	f("log driver", log("json-file"), logging, "json-file null")
	f("log options", log("json-file", "max-size", "1m", "labels", "a"), logging, `json-file {"labels":"a","max-size":"1m"}`)
	f("secrets are not shown", log("splunk", "splunk-token", "x", "splunk-url", "u"), logging, `splunk {"splunk-url":"u"}`)
	f("awslogs", log("awslogs", "awslogs-group", "g", "awslogs-stream", "s"), logging, `awslogs {"awslogs-group":"g","awslogs-stream":"s"}`)
	f("awslogs without a stream", log("awslogs", "awslogs-group", "g"), logging, `awslogs {"awslogs-group":"g","awslogs-stream":"`+id+`"}`)
	f("awslogs with a stream that is not known", log("awslogs", "awslogs-group", "g", "tag", "{{.Name}}"), logging, " null")
	f("awslogs without a group", log("awslogs", "awslogs-stream", "s"), logging, " null")

	restarts := func(d *description) any { return d.container.RestartPolicy }
	policy := func(mode container.RestartPolicyMode) func(*container.InspectResponse) {
		return func(i *container.InspectResponse) { i.HostConfig.RestartPolicy.Name = mode }
	}
	f("no restart policy", policy("no"), restarts, false)
	f("empty restart policy", policy(""), restarts, false)
	f("restart policy", policy("on-failure"), restarts, true)

	cpus := func(d *description) any { return d.nanoCPUs }
	f("no CPU limit", func(i *container.InspectResponse) {}, cpus, int64(0))
	f("--cpus", func(i *container.InspectResponse) { i.HostConfig.NanoCPUs = 25e7 }, cpus, int64(25e7))
	f("--cpu-quota", func(i *container.InspectResponse) { i.HostConfig.CPUQuota = 50000 }, cpus, int64(5e8))
	f("--cpu-period", func(i *container.InspectResponse) { i.HostConfig.CPUQuota, i.HostConfig.CPUPeriod = 50000, 25000 }, cpus, int64(2e9))

	f("a network of the user's", func(i *container.InspectResponse) {
		i.HostConfig.DNS, i.HostConfig.DNSSearch = []string{"10.0.0.2"},
			[]string{"shop.internal"}
		i.NetworkSettings.Networks = map[string]*network.EndpointSettings{
			"back": {IPAddress: "10.1.2.3", IPPrefixLen: 24, Gateway: "10.1.2.1",
				GlobalIPv6Address: "fd00::2", GlobalIPv6PrefixLen: 64,
				IPv6Gateway: "fd00::1", MacAddress: "02:00:00:00:00:01"}}
	}, func(d *description) any { return d.container.DockerNetworks },
		[]task.DockerNetwork{{Name: "back", IPAddress: "10.1.2.3",
			IPv6Address: "fd00::2", Gateway: "10.1.2.1", IPv6Gateway: "fd00::1",
			NetworkDetails: task.NetworkDetails{MAC: "02:00:00:00:00:01",
				Subnet: "10.1.2.0/24", IPv6Subnet: "fd00::/64",
				SubnetGateway: "10.1.2.1/24", IPv6SubnetGateway: "fd00::1/64",
				DNSServers: []string{"10.0.0.2"},
				DNSSearch:  []string{"shop.internal"}, DNSName: "web"}}})
	f("a network without addresses", func(i *container.InspectResponse) {
		i.NetworkSettings.Networks = map[string]*network.EndpointSettings{"none": {}}
	}, func(d *description) any { return d.container.DockerNetworks },
		[]task.DockerNetwork{{Name: "none"}})
}

// made is a task that ECS does not know, of containers that inspects of the recorded one describe.
func made(t *testing.T, cfg Config, changes ...func(*container.InspectResponse)) *task.Task {
	t.Helper()
	f := testFollower(t)
	cfg.Apply, cfg.Engine, cfg.Log = f.cfg.Apply, f.cfg.Engine, f.cfg.Log
	f.cfg = &cfg
	var list []*description
	for _, change := range changes {
		inspect := recorded(t, "running")
		inspect.Config.Labels = map[string]string{}
		change(inspect)
		list = append(list, described(t, inspect))
	}
	return f.build(group(t, list...))
}

func compose(service string,
	more func(*container.InspectResponse)) func(*container.InspectResponse) {
	return func(i *container.InspectResponse) {
		i.Config.Labels[labelComposeProject], i.Config.Labels[labelComposeService] = "shop",
			service
		if more != nil {
			more(i)
		}
	}
}

// A task that ECS does not know has all that clients look for.
func TestMadeUpTaskIsWhole(t *testing.T) {
	alone := made(t, Config{MadeUpZone: "eu-west-1a"}, func(i *container.InspectResponse) {
		i.Config.Labels[task.LabelFamily] = "the user's"
	})
	if !alone.MadeUp || alone.AvailabilityZone != "eu-west-1a" ||
		alone.LaunchType != "EXTERNAL" || alone.ServiceName != "" {
		t.Errorf("got %+v", alone)
	}
	_, each := task.Render(alone)
	for v, doc := range each[0] {
		for _, want := range []string{`"com.amazonaws.ecs.cluster":"cl"`,
			`"com.amazonaws.ecs.container-name":"web"`, `"com.amazonaws.ecs.task-arn":"` + alone.ARN + `"`,
			`"com.amazonaws.ecs.task-definition-family":"the user's"`, `"com.amazonaws.ecs.task-definition-version":"1"`} {
			if !strings.Contains(doc.String(), want) {
				t.Errorf("version %d: no %s in %s", v, want, doc)
			}
		}
	}
	if n := len(alone.Containers[0].Labels); n != 1 {
		t.Errorf("got %d labels kept in memory, want the user's", n)
	}
	given := made(t, Config{MadeUpZone: "eu-west-1a", AvailabilityZone: "eu-west-1c",
		LaunchType: "FARGATE"}, compose("web", nil))
	if given.AvailabilityZone != "eu-west-1c" || given.LaunchType != "FARGATE" {
		t.Errorf("got %+v", given)
	}
}

// A project's ServiceName is the service that all of its containers are of.
func TestServiceName(t *testing.T) {
	f := func(want string, services ...string) {
		t.Helper()
		var changes []func(*container.InspectResponse)
		for _, s := range services {
			changes = append(changes, compose(s, nil))
		}
		if got := made(t, Config{}, changes...).ServiceName; got != want {
			t.Errorf("%v: got %q, want %q", services, got, want)
		}
	}
	f("web", "web")
	f("web", "web", "web")
	f("", "web", "db")
}

// The limits of a task that ECS does not know are the sums of its containers', each resource if all
// have a limit.
func TestLimitsAreSums(t *testing.T) {
	limit := func(nanoCPUs, memory int64) func(*container.InspectResponse) {
		return compose("web", func(i *container.InspectResponse) {
			i.HostConfig.NanoCPUs, i.HostConfig.Memory = nanoCPUs, memory
		})
	}
	f := func(want task.TaskLimits, changes ...func(*container.InspectResponse)) {
		t.Helper()
		if got := made(t, Config{}, changes...).Limits; got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	f(task.TaskLimits{}, limit(0, 0))
	f(task.TaskLimits{CPU: 0.5, Memory: 64}, limit(5e8, 64<<20))
	f(task.TaskLimits{CPU: 0.3, Memory: 96}, limit(1e8, 64<<20), limit(2e8, 32<<20))
	f(task.TaskLimits{Memory: 96}, limit(1e8, 64<<20), limit(0, 32<<20))
	f(task.TaskLimits{CPU: 0.3}, limit(1e8, 64<<20), limit(2e8, 0))
}

// M07, M08, M09: the limits of a task of ECS are those of the task's cgroup, in either version, and
// stay when the cgroup goes.
func TestLimitsOfTaskCgroup(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		file := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f := func(parent string, want task.TaskLimits) {
		t.Helper()
		if got := cgroupLimits(root, parent, "rec"); got != want {
			t.Errorf("%s: got %+v, want %+v", parent, got, want)
		}
	}
	f("/ecs/rec", task.TaskLimits{})
	write("cpu/ecs/rec/cpu.cfs_quota_us", "25000")
	write("cpu/ecs/rec/cpu.cfs_period_us", "100000")
	f("/ecs/rec", task.TaskLimits{CPU: 0.25})
	write("memory/ecs/rec/memory.limit_in_bytes", "536870912")
	f("/ecs/rec", task.TaskLimits{CPU: 0.25, Memory: 512})

	app := described(t, recorded(t, "app")) // its parent is /ecs/rec
	follower := testFollower(t)
	follower.cfg.CgroupRoot = root
	g := group(t, app)
	tk := keep(nil, follower.build(g))
	if tk.Limits != (task.TaskLimits{CPU: 0.25, Memory: 512}) {
		t.Errorf("got %+v", tk.Limits)
	}
	write("cpu/ecs/rec/cpu.cfs_quota_us", "-1")
	write("memory/ecs/rec/memory.limit_in_bytes", "9223372036854771712")
	f("/ecs/rec", task.TaskLimits{})
	if again := keep(tk, follower.build(g)); again != tk {
		t.Errorf("without the cgroup: got %+v, want the task as it was", again)
	}

	write("ecstasks.slice/ecstasks-rec.slice/cpu.max", "150000 100000")
	write("ecstasks.slice/ecstasks-rec.slice/memory.max", "max")
	f("ecstasks-rec.slice", task.TaskLimits{CPU: 1.5})
	write("ecstasks.slice/ecstasks-rec.slice/cpu.max", "max 100000")
	write("ecstasks.slice/ecstasks-rec.slice/memory.max", "67108864")
	f("ecstasks-rec.slice", task.TaskLimits{Memory: 64})
	write("ecs/rec/memory.max", "1073741824")
	f("/ecs/rec", task.TaskLimits{Memory: 1024})

	write("ecs/memory.max", "1073741824") // of all tasks
	f("/ecs", task.TaskLimits{})
	f("/ecs/rec/..", task.TaskLimits{})
	write("ecs/rec/memory.max", "garbage")
	write("ecs/rec/cpu.max", "NaN x")
	f("/ecs/rec", task.TaskLimits{})
}

// A container that asks with its first instruction finds its address in its document: in the only
// network that it has.
func TestNewbornShowsItsAddress(t *testing.T) {
	ep := task.Endpoint{Addr: netip.MustParseAddr("172.17.0.2"), Ifindex: 9,
		MAC: [6]byte{2, 0x42}}
	f := func(ns *namespace, networks []task.DockerNetwork, want ...string) {
		t.Helper()
		inspect := recorded(t, "created")
		d := described(t, inspect)
		d.container.DockerNetworks = networks
		g := group(t, d)
		g[d.container.ID].ns = ns
		c := testFollower(t).build(g).Containers[0]
		var got []string
		for _, n := range c.DockerNetworks {
			got = append(got, n.IPAddress)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		if len(networks) > 0 && networks[0].MAC != "" {
			t.Error("what was described has changed")
		}
	}
	one := &namespace{endpoints: []task.Endpoint{ep}}
	f(one, []task.DockerNetwork{{Name: "bridge"}}, "172.17.0.2")
	f(one, []task.DockerNetwork{{Name: "bridge", IPAddress: "10.0.0.9"}}, "10.0.0.9")
	f(one, []task.DockerNetwork{{Name: "back"}, {Name: "front"}}, "", "")
	f(&namespace{endpoints: []task.Endpoint{ep, ep}}, []task.DockerNetwork{{Name: "bridge"}}, "")
	f(nil, []task.DockerNetwork{{Name: "bridge"}}, "")
}
