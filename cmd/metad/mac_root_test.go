//go:build root

package main

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/vishvananda/netns"

	"metad/internal/expect"
	"metad/internal/testdocker"
	"metad/internal/testnet"
	"metad/pkg/admin"
)

// A container that changes its MAC is answered again with its next packets, and no list of
// containers is needed for that. Another container that sends under made-up MACs, from its own
// address and from the first one's, gets nothing by it, and keeps neither from being answered.
func TestRootChangedMAC(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h, "--reconcile", "1h")
	netAdmin := func(_ *container.Config, hc *container.HostConfig) {
		hc.CapAdd = []string{"NET_ADMIN"}
	}
	changes := h.RunTask(t, testdocker.Task{ID: "changes",
		Containers: []testdocker.Container{{Name: "app", Configure: netAdmin}}})
	spoofer := h.RunTask(t, testdocker.Task{ID: "spoofer",
		Containers: []testdocker.Container{{Name: "app"}}})
	before := ask(t, h, changes.Containers[0], "/v2/metadata")
	macOf := func(id string) string {
		var tasks admin.Tasks
		out, _ := d.run("tasks", "--json", "--run-dir", d.runDir())
		if err := json.Unmarshal([]byte(out), &tasks); err != nil {
			t.Fatalf("metad tasks: %v: %s", err, out)
		}
		for _, tk := range tasks.Tasks {
			if tk.ID == id && len(tk.Endpoints) == 1 {
				return tk.Endpoints[0].MAC
			}
		}
		return ""
	}

	ns, err := netns.GetFromPid(h.Inspect(t, spoofer.Pause).State.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	raw := testnet.NewRaw(t, ns, "ecs-eth0")
	flood := func(n int) {
		for i := range n {
			mac := [6]byte{2, 0, 0, 0, byte(i >> 8), byte(i)}
			gateway := [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
			raw.Send(testnet.Frame{SrcMAC: mac, DstMAC: gateway, Src: spoofer.Port.Addr,
				SrcPort: 41000}.Bytes(),
				testnet.Frame{SrcMAC: mac, DstMAC: gateway, Src: changes.Port.Addr,
					SrcPort: 41001}.Bytes())
		}
	}
	flood(1000)
	for n, mac := range []string{"0a:58:00:00:00:01", "0a:58:00:00:00:02"} {
		h.Exec(t, changes.Containers[0], "ip", "link", "set", "dev", "ecs-eth0", "address",
			mac)
		flood(1000)
		began := time.Now()
		// One wget: a packet that is sent again ends the wait, no other request does.
		got := h.Exec(t, changes.Containers[0], "timeout", "20", "wget", "-qO-",
			"http://169.254.170.2/v2/metadata")
		if got != before {
			t.Errorf("change %d: answered\n%s\nbefore\n%s", n, got, before)
		}
		t.Logf("change %d: answered after %v", n, time.Since(began).Round(time.Millisecond))
		expect.Until(t, "the task has its new MAC", func() bool {
			return macOf("changes") == mac
		})
	}
	if s, ok := raw.Answer(41000, 100*time.Millisecond); ok {
		t.Errorf("a made-up MAC was answered: %+v", s)
	}
	if s, ok := raw.Answer(41001, 100*time.Millisecond); ok {
		t.Errorf("a made-up MAC at the other's address was answered: %+v", s)
	}
	if got, want := macOf("spoofer"), spoofer.Port.MAC.String(); got != want {
		t.Errorf("the spoofer's MAC is %s now, want %s", got, want)
	}
	ask(t, h, spoofer.Containers[0], "/v2/metadata")
}
