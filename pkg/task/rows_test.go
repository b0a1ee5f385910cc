package task

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// keys returns the members of the JSON object that doc is, in order.
func keys(t *testing.T, doc []byte) (list []string) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(doc))
	if _, err := d.Token(); err != nil {
		t.Fatal(err)
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, key.(string))
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			t.Fatalf("%v in %s", err, doc)
		}
	}
	return list
}

// inOrder fails unless got has members of order only, in that order, and all that must be there.
func inOrder(t *testing.T, what string, got []string, order string, must ...string) {
	t.Helper()
	rest := strings.Fields(order)
	for _, key := range got {
		i := slices.Index(rest, key)
		if i < 0 {
			t.Errorf("%s: %s is unknown or out of order in %v", what, key, got)
			return
		}
		rest = rest[i+1:]
	}
	for _, key := range must {
		if !slices.Contains(got, key) {
			t.Errorf("%s: no %s in %v", what, key, got)
		}
	}
}

// The agent's orders on the wire (ecs-agent/tmds/handlers/v2/response.go, v4/state/response.go).
const (
	containerOrder2 = "DockerId Name DockerName Image ImageID Ports Labels DesiredStatus " +
		"KnownStatus ExitCode Limits CreatedAt StartedAt " +
		"FinishedAt Type Networks Health Volumes"
	containerOrder4 = "DockerId Name DockerName Image ImageID Ports Labels DesiredStatus " +
		"KnownStatus ExitCode Limits CreatedAt StartedAt " +
		"FinishedAt Type Health Volumes LogDriver LogOptions ContainerARN Networks " +
		"Snapshotter RestartCount"
	networkOrder4 = "NetworkMode IPv4Addresses IPv6Addresses AttachmentIndex MACAddress " +
		"IPv4SubnetCIDRBlock IPv6SubnetCIDRBlock " +
		"DomainNameServers DomainNameSearchList PrivateDNSName SubnetGatewayIpv4Address " +
		"SubnetGatewayIpv6Address"
	taskOrder2 = "Cluster TaskARN Family Revision DesiredStatus KnownStatus Containers " +
		"Limits PullStartedAt PullStoppedAt " +
		"ExecutionStoppedAt AvailabilityZone"
	taskOrder4 = "Cluster TaskARN Family Revision DesiredStatus KnownStatus Limits " +
		"PullStartedAt PullStoppedAt ExecutionStoppedAt " +
		"AvailabilityZone TaskTags ContainerInstanceTags LaunchType Errors Containers " +
		"VPCID ServiceName Group ClockDrift " +
		"EphemeralStorageMetrics FaultInjectionEnabled AvailabilityZoneID"
)

// V01, V02: a v3 document has the members of v2, in v2's order, and none of v4's.
func TestV01V3HasTheFormOfV2(t *testing.T) {
	for _, tk := range []*Task{full(), bridge()} {
		whole, each := Render(tk)
		inOrder(t, "task", keys(t, whole[V3].AppendTo(nil)), taskOrder2, "TaskARN", "Containers")
		for i := range each {
			doc := each[i][V3].AppendTo(nil)
			inOrder(t, "container", keys(t, doc), containerOrder2, "DockerId", "Limits", "Type")
			if bytes.Contains(doc, []byte("HostIp")) {
				t.Errorf("HostIp is v4's: %s", doc)
			}
		}
	}
}

// V06: a v4 container has Networks after Volumes, with MACAddress and the rest.
func TestV06ContainerOfV4(t *testing.T) {
	for _, tk := range []*Task{full(), bridge()} {
		_, each := Render(tk)
		inOrder(t, "container", keys(t, each[0][V4].AppendTo(nil)), containerOrder4, "ContainerARN", "LogDriver", "Limits", "Networks", "RestartCount")
		for i := range each {
			var doc struct{ Networks []json.RawMessage }
			if err := json.Unmarshal(each[i][V4].AppendTo(nil), &doc); err != nil {
				t.Fatal(err)
			}
			for _, n := range doc.Networks {
				inOrder(t, "network", keys(t, n), networkOrder4, "NetworkMode", "IPv4Addresses")
			}
		}
	}
}

// V07: a v4 task has Containers after Errors, and FaultInjectionEnabled always.
func TestV07TaskOfV4(t *testing.T) {
	for _, tk := range []*Task{full(), bridge(), {ARN: "arn"}} {
		whole, _ := Render(tk)
		inOrder(t, "task", keys(t, whole[V4].AppendTo(nil)), taskOrder4, "FaultInjectionEnabled")
	}
}

// V13: outside awsvpc, Networks of v3 and v4 are Docker's by name, and one empty address on the
// host's network.
func TestV13NetworksOfDocker(t *testing.T) {
	_, each := Render(bridge())
	f := func(i int, want string) {
		t.Helper()
		for _, v := range []Version{V3, V4} {
			var doc struct {
				Networks []struct {
					NetworkMode   string
					IPv4Addresses []string
				}
			}
			if err := json.Unmarshal(each[i][v].AppendTo(nil), &doc); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range doc.Networks {
				got = append(got, n.NetworkMode+"="+strings.Join(n.IPv4Addresses,
					","))
				if len(n.IPv4Addresses) != 1 {
					t.Errorf("container %d: %d addresses, want one", i,
						len(n.IPv4Addresses))
				}
			}
			if strings.Join(got, " ") != want {
				t.Errorf("container %d, version %d: got %q, want %q", i, v, got,
					want)
			}
		}
		if slices.Contains(keys(t, each[i][V2].AppendTo(nil)), "Networks") {
			t.Errorf("container %d: v2 has Networks", i)
		}
	}
	f(0, "shop_back=172.18.0.2 shop_front=172.19.0.2")
	f(1, "shop_back=172.18.0.2 shop_front=172.19.0.2") // it uses the first one's
	f(2, "host=")
	f(3, "container:another=")
	f(4, "") // not created yet
}

// Scripts without a JSON parser find what they look for in the documents of a task that ECS does
// not know.
func TestDocumentsForScripts(t *testing.T) {
	tk := bridge()
	tk.MadeUp, tk.AvailabilityZone = true, "us-west-2a"
	whole, each := Render(tk)
	dir := t.TempDir()
	for name, doc := range map[string]Document{"task": whole[V4], "container": each[0][V4]} {
		if err := os.WriteFile(filepath.Join(dir, name), doc.AppendTo(nil),
			0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := func(script, want string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", script, got, err, want)
		}
	}
	f(`sed 's/.*"AvailabilityZone":"\([^"]*\)".*/\1/' task | sed 's/[a-z]$//'`, "us-west-2")
	f(`arn=$(sed 's/.*"TaskARN":"\([^"]*\)".*/\1/' task); echo "${arn##*/}"`, "shop")
	f(`sed 's/.*"TaskARN":"\([^"]*\)".*/\1/' task | cut -d: -f4`, "us-west-2")
	f(`sed 's/.*"TaskARN":"\([^"]*\)".*/\1/' task | cut -d/ -f2`, "default")
	f(`grep -o '"LaunchType":"[^"]*"' task | cut -d'"' -f4`, "EXTERNAL")
	f(`grep -o '"com.amazonaws.ecs.task-definition-family":"[^"]*"' container | cut -d'"' -f4`, "shop")
	f(`grep -o '"com.amazonaws.ecs.container-name":"[^"]*"' container | cut -d'"' -f4`, "web")
	f(`grep -o '"IPv4Addresses":\["[^"]*"' container | head -1 | cut -d'"' -f4`, "172.18.0.2")
	f(`sed 's/.*"ContainerARN":"\([^"]*\)".*/\1/' container | cut -d: -f6 | cut -d/ -f1-3`, "container/default/shop")
}
