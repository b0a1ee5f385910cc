//go:build root

package docker

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/docker/docker/api/types/container"

	"metad/internal/testdocker"
	"metad/pkg/task"
)

// M08, V06: a task of ECS has the limits of its cgroup, and v4 shows its network interface.
func TestRootTaskOfECS(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	rt := h.RunTask(t,
		testdocker.Task{ENI: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/24")},
			Containers: []testdocker.Container{{Name: "app"}}})
	app := rt.Containers[0]
	parent := h.Inspect(t, app).HostConfig.CgroupParent
	limits := map[string]string{"cpu" + parent + "/cpu.cfs_quota_us": "50000",
		"memory" + parent + "/memory.limit_in_bytes": "268435456"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		limits = map[string]string{parent + "/cpu.max": "50000 100000",
			parent + "/memory.max": "268435456"}
	}
	for file, text := range limits {
		if err := os.WriteFile(filepath.Join("/sys/fs/cgroup", file), []byte(text),
			0o644); err != nil {
			t.Fatal(err)
		}
	}
	w.Refresh()
	want := task.TaskLimits{CPU: 0.5, Memory: 256}
	tk, c := w.until(t, "limits", app, func(tk *task.Task, c *task.Container) bool {
		return c != nil && tk.Limits == want
	})
	if len(c.Networks) != 1 || c.Networks[0].Subnet != "10.1.2.0/24" ||
		len(c.Networks[0].MAC) != len("02:00:00:00:00:00") {
		t.Errorf("networks: got %+v", c.Networks)
	}
	if tk.MadeUp || tk.ServiceName != "" {
		t.Errorf("got %+v", tk)
	}
	h.Remove(t, app)
	tk, _ = w.until(t, "no app", rt.Pause, func(tk *task.Task, _ *task.Container) bool {
		return len(tk.Containers) == 1
	})
	if tk.Limits != want {
		t.Errorf("without its cgroup the task has limits %+v, want %+v", tk.Limits, want)
	}
}

// V06, V13: what Docker says of a container and its network is in v3 and v4.
func TestRootContainerOfDocker(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	id := h.Run(t, testdocker.Container{Name: "whole", Configure: func(_ *container.Config,
		host *container.HostConfig) {
		host.RestartPolicy.Name = "unless-stopped"
		host.NanoCPUs, host.Memory = 5e8, 64<<20
		host.LogConfig = container.LogConfig{Type: "json-file",
			Config: map[string]string{"max-size": "1m"}}
	}})
	tk, c := w.until(t, "started", id, func(tk *task.Task, c *task.Container) bool {
		return running(tk, c) && !c.StartedAt.IsZero()
	})
	n := c.DockerNetworks[0]
	if n.Subnet != "172.17.0.0/16" || n.SubnetGateway != "172.17.0.1/16" || n.MAC == "" ||
		n.DNSName != "" {
		t.Errorf("network: got %+v", n)
	}
	if !c.RestartPolicy || c.LogDriver != "json-file" || c.LogOptions["max-size"] != "1m" {
		t.Errorf("got %+v", c)
	}
	if want := (task.TaskLimits{CPU: 0.5, Memory: 64}); tk.Limits != want || !tk.MadeUp ||
		tk.LaunchType != "EXTERNAL" {
		t.Errorf("got %+v", tk)
	}
	onHost := h.Run(t, testdocker.Container{Name: "onhost", Network: "host"})
	tk, c = w.until(t, "on the host's network", onHost,
		func(_ *task.Task, c *task.Container) bool { return c != nil && c.Running() })
	_, each := task.Render(tk)
	var doc struct {
		Networks []struct {
			NetworkMode   string
			IPv4Addresses []string
		}
	}
	if err := json.Unmarshal(each[0][task.V3].AppendTo(nil), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Networks) != 1 || doc.Networks[0].NetworkMode != "host" ||
		len(doc.Networks[0].IPv4Addresses) != 1 || doc.Networks[0].IPv4Addresses[0] != "" {
		t.Errorf("%s: got %+v", c.Name, doc.Networks)
	}
}
