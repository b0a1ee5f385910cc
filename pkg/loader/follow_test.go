package loader

import (
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// newTestFollower follows a host of devices that are given by message, and notes its callbacks.
func newTestFollower(t *testing.T, started bool) (*follower, fakeTasks, *[]string) {
	t.Helper()
	p, _, _ := newTestPorts("br-*")
	replace(p, devices)
	tasks := newFakeTasks(t)
	told := new([]string)
	f := &follower{
		ports: p, tasks: tasks.taskMap, log: zap.NewNop(), started: started,
		onPort: func(ifindex int) {
			*told = append(*told, fmt.Sprint("port ", ifindex))
		},
		onPortGone: func(ifindex int) {
			*told = append(*told, fmt.Sprint("gone ", ifindex))
		},
	}
	return f, tasks, told
}

func message(typ uint16, family uint8, d device) netlink.LinkUpdate {
	a := netlink.LinkAttrs{Index: d.ifindex, Name: d.name, MasterIndex: d.master}
	u := netlink.LinkUpdate{Link: &netlink.GenericLink{LinkAttrs: a, LinkType: d.kind}}
	u.Header = unix.NlMsghdr{Type: typ}
	u.IfInfomsg = nl.IfInfomsg{IfInfomsg: unix.IfInfomsg{Family: family,
		Index: int32(d.ifindex)}}
	return u
}

// A port that comes and goes is told of once each, and so is a device that has a task's address;
// others are not.
func TestFollowTells(t *testing.T) {
	f, tasks, told := newTestFollower(t, true)
	veth8 := device{ifindex: 8, name: "veth8", kind: "veth", master: 2}
	lone := device{ifindex: 9, name: "lone", kind: "veth"}
	tasks.mustPut(t, 1, 1, 9)
	f.update(message(unix.RTM_NEWLINK, unix.AF_UNSPEC, veth8))
	f.update(message(unix.RTM_NEWLINK, unix.AF_UNSPEC, veth8))
	f.update(message(unix.RTM_NEWLINK, unix.AF_UNSPEC, lone))
	f.update(message(unix.RTM_DELLINK, unix.AF_UNSPEC, veth8))
	f.update(message(unix.RTM_DELLINK, unix.AF_UNSPEC, lone))
	f.update(message(unix.RTM_DELLINK, unix.AF_UNSPEC, tap7))
	wantLog(t, "told", *told, "port 8", "gone 8", "gone 9")
}

// A bridge's own messages about its ports are not taken for the end of a device.
func TestFollowBridgeFamily(t *testing.T) {
	f, _, told := newTestFollower(t, true)
	f.update(message(unix.RTM_DELLINK, unix.AF_BRIDGE, veth3))
	if len(*told) != 0 || !f.ports.has(3) {
		t.Errorf("told %v; has 3: %v", *told, f.ports.has(3))
	}
}

// The callbacks run with no lock held, and what was behind a device has left the kernel by then.
func TestFollowCallbacksHoldNoLock(t *testing.T) {
	f, tasks, _ := newTestFollower(t, true)
	tasks.mustPut(t, 1, 1, 3)
	called := false
	f.onPortGone = func(ifindex int) {
		called = true
		if len(tasks.tasks.m) != 0 || f.ports.has(ifindex) {
			t.Errorf("ifindex %d is still known", ifindex)
		}
		tasks.mustPut(t, 2, 2, 4)
		f.ports.list()
	}
	f.update(message(unix.RTM_DELLINK, unix.AF_UNSPEC, veth3))
	if !called {
		t.Error("not called")
	}
}

// During a start there is no caller yet that could know a port: nothing is told.
func TestFollowStartIsSilent(t *testing.T) {
	f, tasks, told := newTestFollower(t, false)
	if err := tasks.put(addr(1), &bpf.TaskValue{Tag: 1, Ifindex: 3}); err != nil {
		t.Fatal(err)
	}
	f.settle([]int{3, 4})
	f.gone(3)
	wantLog(t, "told", *told)
}
