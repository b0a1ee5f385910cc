package mdfile

import (
	"encoding/json"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"metad/internal/expect"
	"metad/pkg/task"
)

const (
	testARN = "arn:aws:ecs:us-west-2:111122223333:task/default/158d1c8083dd49d6b527399fd6414f5c"
	testID  = "ef3dabed9bef087ed147024a221d2d3a822e85d53c0ca4024d3d78e7913eeb64"
)

var (
	testTime = time.Unix(1487102643, 0)
	testHost = Host{
		ContainerInstanceARN: "arn:aws:ecs:us-west-2:111122223333:container-instance/default/732d1a0b",
		AvailabilityZone:     "us-west-2a",
		PrivateIPv4Address:   "10.0.0.1",
		PublicIPv4Address:    "203.0.113.7",
	}
)

func testTask(c ...*task.Container) *task.Task {
	return &task.Task{ARN: testARN, Cluster: "default", Family: "web", Revision: "7",
		Containers: c}
}

func runningContainer() *task.Container {
	return &task.Container{
		ID: testID, Name: "app", DockerName: "ecs-web-7-app-aabb", Image: "nginx:1",
		ImageID: "sha256:04bbc221",
		State:   "running", PID: 42, NetworkMode: "default",
		Ports: []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 8080,
			HostIP: "0.0.0.0"}},
		DockerNetworks: []task.DockerNetwork{
			{Name: "bridge", IPAddress: "172.17.0.2", Gateway: "172.17.0.1", IPv6Address: "fd00::2", IPv6Gateway: "fd00::1"},
		},
	}
}

func text(t *task.Task, c *task.Container, h Host) string {
	return string(newDocument(t, c, h).append(nil, testTime))
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	expect.Golden(t, filepath.Join("testdata", name), []byte(got))
}

// The three lives of a file. F04: before the container is there. F05, F08, F09, F10: while it runs.
// Proposal 001: the sample document's keys, and what is added when.
func TestDocumentGolden(t *testing.T) {
	running := runningContainer()
	first := &task.Container{Name: "app", DockerName: "ecs-web-7-app-aabb", Image: "nginx:1",
		State: "created"}
	created := *first
	created.ID = testID
	golden(t, "first.json", text(testTask(), first, testHost))
	golden(t, "created.json", text(testTask(), &created, testHost))
	golden(t, "ready.json", text(testTask(running), running, testHost))
}

// keys returns the top-level keys of a file in their order, as grep would find them.
func keys(doc string) (keys []string) {
	for line := range strings.Lines(doc) {
		if key, ok := strings.CutPrefix(line, "\t\""); ok {
			keys = append(keys, key[:strings.IndexByte(key, '"')])
		}
	}
	return keys
}

func TestDocumentKeys(t *testing.T) {
	agent := []string{"Cluster", "ContainerInstanceARN", "TaskARN", "TaskDefinitionFamily",
		"TaskDefinitionRevision",
		"ContainerID", "ContainerName", "DockerContainerName", "ImageID", "ImageName", "PortMappings", "Networks",
		"MetadataFileStatus", "AvailabilityZone", "HostPrivateIPv4Address", "HostPublicIPv4Address", "HostIPv6Address"}
	proposal := []string{"Version", "Status", "ClusterArn", "Container_Instance", "TaskArn",
		"ImageName", "ImageID",
		"ContainerID", "PortMappings", "NetworkMode", "Gateway", "IPAddress", "IPv6Gateway", "LastUpdatedAt"}
	h := testHost
	h.IPv6Address = "2001:db8::1"
	c := runningContainer()
	got := keys(text(testTask(c), c, h))
	if !slices.Equal(got[:len(agent)], agent) {
		t.Errorf("the agent's keys: got %q, want %q", got[:len(agent)], agent)
	}
	for _, k := range proposal {
		if !slices.Contains(got, k) {
			t.Errorf("the proposal's key %s is not there", k)
		}
	}

	// F04: not before the start, whatever is known already.
	c.State, c.PID = "created", 0
	got = keys(text(testTask(c), c, h))
	for _, k := range []string{"MetadataFileStatus", "Networks", "PortMappings"} {
		if slices.Contains(got, k) {
			t.Errorf("%s is there before the start", k)
		}
	}
	c.ID, c.ImageID = "", ""
	got = keys(text(testTask(c), c, h))
	for _, k := range []string{"ContainerID", "ImageID", "DockerContainerName"} {
		if slices.Contains(got, k) {
			t.Errorf("%s is there before the container is", k)
		}
	}
}

// Decoders that do not mind the case of letters, such as Go's, get the right value into either's
// struct.
func TestDocumentCaseInsensitiveClients(t *testing.T) {
	c := runningContainer()
	doc := text(testTask(c), c, testHost)
	var agent struct {
		Cluster, ContainerInstanceARN, TaskARN, ContainerID, ImageID,
		MetadataFileStatus string
		PortMappings []struct{ BindIp string } //nolint:revive // the agent's spelling
		Networks     []struct {
			NetworkMode   string
			IPv4Addresses []string
		}
	}
	if err := json.Unmarshal([]byte(doc), &agent); err != nil {
		t.Fatal(err)
	}
	if agent.Cluster != "default" || agent.TaskARN != testARN ||
		agent.ContainerInstanceARN != testHost.ContainerInstanceARN ||
		agent.MetadataFileStatus != "READY" || agent.PortMappings[0].BindIp != "0.0.0.0" ||
		agent.Networks[0].NetworkMode != "bridge" ||
		agent.Networks[0].IPv4Addresses[0] != "172.17.0.2" {
		t.Errorf("the agent's struct: got %+v", agent)
	}
	var proposal struct {
		Version, Status, ClusterArn, TaskArn, NetworkMode, Gateway, IPAddress, IPv6Gateway,
		LastUpdatedAt string

		Instance     string                    `json:"Container_Instance"`
		PortMappings []struct{ BindIP string } //
	}
	if err := json.Unmarshal([]byte(doc), &proposal); err != nil {
		t.Fatal(err)
	}
	if proposal.Version != "v1" || proposal.Status != "running" ||
		proposal.TaskArn != testARN ||
		proposal.ClusterArn != "arn:aws:ecs:us-west-2:111122223333:cluster/default" ||
		proposal.Instance != testHost.ContainerInstanceARN ||
		proposal.NetworkMode != "bridge" || proposal.Gateway != "172.17.0.1" ||
		proposal.IPAddress != "172.17.0.2" ||
		proposal.IPv6Gateway != "fd00::1" || proposal.LastUpdatedAt != "1487102643" ||
		proposal.PortMappings[0].BindIP != "0.0.0.0" {
		t.Errorf("the proposal's struct: got %+v", proposal)
	}

	// And in general: keys that differ in case only have equal values, at every level.
	var check func(where string, v any)
	check = func(where string, v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				check(where, e)
			}
		case map[string]any:
			for a := range v {
				for b := range v {
					if strings.EqualFold(a, b) &&
						!reflect.DeepEqual(v[a], v[b]) {
						t.Errorf("%s.%s is %v but %s is %v", where, a, v[a],
							b, v[b])
					}
				}
				check(where+"."+a, v[a])
			}
		}
	}
	var all any
	if err := json.Unmarshal([]byte(doc), &all); err != nil {
		t.Fatal(err)
	}
	check("", all)
}

// F08, and what scripts with grep and sed rely on.
func TestDocumentLines(t *testing.T) {
	c := runningContainer()
	doc := text(testTask(c), c, testHost)
	if strings.HasSuffix(doc, "\n") ||
		!strings.HasPrefix(doc, "{\n\t\"Cluster\": \"default\",\n") {
		t.Errorf("got %q…%q", doc[:30], doc[len(doc)-10:])
	}
	for line := range strings.Lines(doc) {
		if strings.Count(line, `": `) > 1 {
			t.Errorf("more than one key in %q", line)
		}
		for _, k := range []string{"TaskARN", "ContainerID", "ImageID",
			"MetadataFileStatus", "HostPrivateIPv4Address"} {
			if strings.Contains(line, `"`+k+`"`) && !strings.HasSuffix(line, "\",\n") {
				t.Errorf("no trailing comma in %q", line)
			}
		}
	}
}

// F10: no ports, no key. F11: no Docker networks, one element that says so. Networks in general:
// which of them the proposal's flat keys describe.
func TestDocumentNetworks(t *testing.T) {
	type flat struct{ mode, gateway, ip string }
	pause := &task.Container{ID: "pause", Name: task.PauseName, Type: task.TypeCNIPause,
		State: "running", PID: 1, NetworkMode: "none",
		DockerNetworks: []task.DockerNetwork{{Name: "none"}}}
	owner := &task.Container{ID: "owner", State: "running", PID: 1, NetworkMode: "front",
		DockerNetworks: []task.DockerNetwork{{Name: "back", IPAddress: "10.1.0.2",
			Gateway: "10.1.0.1"}, {Name: "front", IPAddress: "10.2.0.2",
			Gateway: "10.2.0.1"}}}
	for _, tt := range []struct {
		name     string
		c        task.Container
		networks string
		flat     flat
	}{
		{"bridge", task.Container{NetworkMode: "bridge",
			DockerNetworks: []task.DockerNetwork{{Name: "bridge",
				IPAddress: "172.17.0.2", Gateway: "172.17.0.1"}}},
			`[{"NetworkMode":"bridge","IPv4Addresses":["172.17.0.2"]}]`,
			flat{"bridge", "172.17.0.1", "172.17.0.2"}},
		{"IPv6", task.Container{NetworkMode: "n",
			DockerNetworks: []task.DockerNetwork{{Name: "n", IPAddress: "10.0.0.2",
				IPv6Address: "fd00::2"}}},
			`[{"NetworkMode":"n","IPv4Addresses":["10.0.0.2"],"IPv6Addresses":["fd00::2"]}]`, flat{"n", "", "10.0.0.2"}},
		{"two", task.Container{NetworkMode: "front", DockerNetworks: owner.DockerNetworks},
			`[{"NetworkMode":"back","IPv4Addresses":["10.1.0.2"]},{"NetworkMode":"front","IPv4Addresses":["10.2.0.2"]}]`, flat{"front", "10.2.0.1", "10.2.0.2"}},
		{"moved", task.Container{NetworkMode: "default",
			DockerNetworks: owner.DockerNetworks[:1]},
			`[{"NetworkMode":"back","IPv4Addresses":["10.1.0.2"]}]`,
			flat{"bridge", "10.1.0.1", "10.1.0.2"}},
		{"host", task.Container{NetworkMode: "host",
			DockerNetworks: []task.DockerNetwork{{Name: "host"}}},
			`[{"NetworkMode":"host","IPv4Addresses":[""]}]`, flat{"host", "", ""}},
		{"F11 none listed", task.Container{NetworkMode: "container:elsewhere"},
			`[{"NetworkMode":"container:elsewhere","IPv4Addresses":[""]}]`,
			flat{"container:elsewhere", "", ""}},
		{"another's", task.Container{NetworkMode: "container:owner"},
			`[{"NetworkMode":"container:owner","IPv4Addresses":[""]}]`,
			flat{"container:owner", "10.2.0.1", "10.2.0.2"}},
		{"awsvpc", task.Container{NetworkMode: "container:pause",
			Networks: []task.Network{{Mode: "awsvpc",
				IPv4Addresses: []string{"10.0.2.106"}}}},
			`[{"NetworkMode":"container:pause","IPv4Addresses":[""]}]`,
			flat{"awsvpc", "", "10.0.2.106"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.c.State, tt.c.PID = "running", 7
			d := newDocument(testTask(&tt.c, pause, owner), &tt.c, Host{})
			b, _ := json.Marshal(d.Networks)
			if string(b) != tt.networks {
				t.Errorf("Networks: got %s, want %s", b, tt.networks)
			}
			if got := (flat{d.NetworkMode, d.Gateway, d.IPAddress}); got != tt.flat {
				t.Errorf("flat: got %+v, want %+v", got, tt.flat)
			}
			if d.PortMappings != nil {
				t.Errorf("F10: got ports %+v", d.PortMappings)
			}
		})
	}
}

// READY means that the container runs and that the network facts are of this run.
func TestDocumentReady(t *testing.T) {
	f := func(state string, pid int, want string) {
		t.Helper()
		c := runningContainer()
		c.State, c.PID = state, pid
		d := newDocument(testTask(c), c, Host{})
		if d.MetadataFileStatus != want || d.Status != state ||
			(d.Networks != nil) != (want != "") || (d.IPAddress != "") != (want != "") {
			t.Errorf("%s: got %q, Status %q, networks %v %q", state,
				d.MetadataFileStatus, d.Status, d.Networks, d.IPAddress)
		}
	}
	f("created", 0, "")
	f("running", 42, StatusReady)
	f("paused", 42, StatusReady)
	f("restarting", 0, "")
	f("exited", 0, "")
	f("dead", 0, "")
}

// A container of a host without an agent has no ARN, cluster or instance before its task is known:
// the agent's keys are absent, the proposal's empty, as in its sample.
func TestDocumentBare(t *testing.T) {
	doc := text(&task.Task{}, &task.Container{DockerName: "web", State: "created"}, Host{})
	if got := strings.Join(keys(doc),
		" "); got != "ContainerName Version Status ClusterArn Container_Instance "+
		"TaskArn NetworkMode Gateway IPAddress IPv6Gateway LastUpdatedAt" {
		t.Errorf("got keys %s", got)
	}
	d := newDocument(&task.Task{ARN: testARN, Cluster: "arn:aws:ecs:x:1:cluster/c"},
		&task.Container{}, Host{Cluster: "other"})
	if d.ClusterARN != "arn:aws:ecs:x:1:cluster/c" || d.Cluster != d.ClusterARN {
		t.Errorf("cluster configured by ARN: got %q, %q", d.Cluster, d.ClusterARN)
	}
}

// The host's address is one of its own, and of one family only.
func TestLocalHost(t *testing.T) {
	h := LocalHost("blue", "us-west-2a")
	if h.Cluster != "blue" || h.AvailabilityZone != "us-west-2a" {
		t.Errorf("got %+v", h)
	}
	if h.PrivateIPv4Address != "" && h.IPv6Address != "" {
		t.Errorf("both families: %+v", h)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{"": true} // no route to anywhere
	for _, a := range addrs {
		own[a.(*net.IPNet).IP.String()] = true
	}
	if !own[h.PrivateIPv4Address] || !own[h.IPv6Address] {
		t.Errorf("not the host's: %+v", h)
	}
}
