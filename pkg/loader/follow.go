package loader

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"metad/pkg/netdump"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// follower receives the kernel's messages about devices and passes them to ports and tasks. All of
// it happens in one goroutine, which calls onPort and onPortGone with no lock held.
type follower struct {
	host       netns.NsHandle
	nl         *netlink.Handle // in host
	ports      *ports
	tasks      *taskMap
	log        *zap.Logger
	onPort     func(ifindex int)
	onPortGone func(ifindex int)

	own  int   // ifindex of metad's own device
	gate *gate // told when something happens to it; nil in tests

	// the first reading is done; before, there is no caller yet that could know a port
	started bool
	repair  *time.Timer // runs while metad's own device has to be made anew
	mended  time.Time   // the last time
	done    chan struct{}
	wg      sync.WaitGroup
}

// start hooks the existing devices and begins to follow changes.
func (f *follower) start() error {
	f.repair = time.NewTimer(0)
	f.repair.Stop()
	updates, unsubscribe, err := f.subscribe()
	if err != nil {
		return err
	}
	if err := f.resync(); err != nil {
		unsubscribe()
		return err
	}
	f.started = true
	f.wg.Go(func() { f.run(updates, unsubscribe) })
	return nil
}

func (f *follower) stop() {
	close(f.done)
	f.wg.Wait()
}

func (f *follower) run(updates <-chan netlink.LinkUpdate, unsubscribe func()) {
	for {
		f.process(updates)
		unsubscribe()
		for {
			select {
			case <-f.done:
				return
			default:
			}
			// The socket's buffer was full, or the socket broke: start over.
			var err error
			updates, unsubscribe, err = f.subscribe()
			if err == nil {
				if err = f.resync(); err == nil {
					break
				}
				unsubscribe()
			}
			f.log.Error("cannot follow network devices, trying again", zap.Error(err))
			if !wait(f.done) {
				return
			}
		}
	}
}

// subscribe returns a channel that is closed when the subscription breaks.
func (f *follower) subscribe() (<-chan netlink.LinkUpdate, func(), error) {
	ch := make(chan netlink.LinkUpdate, 64)
	done := make(chan struct{})
	err := netlink.LinkSubscribeWithOptions(ch, done, netlink.LinkSubscribeOptions{
		Namespace: &f.host,
		ErrorCallback: func(err error) {
			select {
			case <-done: // closed by us
			default:
				f.log.Info("following network devices", zap.Error(err))
			}
		},
		ReceiveBufferSize: 1 << 20, // a thousand ports at once
	})
	if err != nil {
		close(done)
		return nil, nil, fmt.Errorf("follow network devices: %w", err)
	}
	var once sync.Once
	return ch, func() {
		once.Do(func() {
			close(done)
			go func() { // the subscription may be blocked on sending
				for range ch {
				}
			}()
		})
	}, nil
}

// process handles updates until the channel or done is closed, and between updates the pending
// ports.
func (f *follower) process(updates <-chan netlink.LinkUpdate) {
	now := make(chan struct{})
	close(now)
	for {
		var more <-chan struct{}
		if f.ports.waiting() > 0 {
			more = now
		}
		select {
		case <-f.done:
			return
		case <-more:
			if ifindex, ok := f.ports.next(); ok {
				f.ports.settle(ifindex)
			}
			if f.ports.waiting() == 0 {
				f.log.Info("all ports are attached")
			}
		case <-f.repair.C:
			f.rebuild()
		case <-f.ports.changed:
			f.ports.queueAll()
		case u, ok := <-updates:
			if !ok {
				return
			}
			f.update(u)
		}
	}
}

func (f *follower) update(u netlink.LinkUpdate) {
	// A bridge reports its ports in messages of its own family. There DELLINK means that the
	// port left, which the device's own message reports too.
	if u.IfInfomsg.Family != unix.AF_UNSPEC {
		return
	}
	if u.Attrs().Index == f.own {
		f.checkOwn()
	}
	switch u.Header.Type {
	case unix.RTM_NEWLINK:
		f.settle(f.ports.is(deviceOf(u.Link)))
	case unix.RTM_DELLINK:
		f.gone(u.Attrs().Index)
	}
	if u.Link.Type() == "bridge" {
		f.ports.tellSilent()
	}
}

func deviceOf(l netlink.Link) device {
	a := l.Attrs()
	d := device{ifindex: a.Index, name: a.Name, kind: l.Type(), master: a.MasterIndex,
		up: a.Flags&net.FlagUp != 0}
	if d.kind == "veth" && a.NetNsID < 0 {
		d.peer = a.ParentIndex
	}
	return d
}

// repairPause is the time between two repairs, so that a program that sets the device down again
// and again does not keep metad busy.
const repairPause = time.Second

// checkOwn checks metad's own device, and starts its repair if necessary.
func (f *follower) checkOwn() {
	if f.gate != nil && f.gate.check() {
		f.repair.Reset(max(0, time.Until(f.mended.Add(repairPause))))
	}
}

func (f *follower) rebuild() {
	f.mended = time.Now()
	if err := f.gate.rebuild(); err != nil {
		f.log.Error("cannot rebuild metad's network device, trying again", zap.Error(err))
		f.repair.Reset(repairPause)
	}
}

// resync reads all devices and updates ports and tasks.
func (f *follower) resync() error {
	links, err := netdump.Whole(f.nl.LinkList)
	if err != nil {
		return fmt.Errorf("list network devices: %w", err)
	}
	all := make([]device, len(links))
	for i, l := range links {
		all[i] = deviceOf(l)
	}
	gone, todo := f.ports.replace(all, f.tasks.ports())
	for _, ifindex := range gone {
		f.gone(ifindex)
	}
	f.settle(todo)
	f.ports.tellSilent()
	f.checkOwn()
	return nil
}

func (f *follower) settle(todo []int) {
	for _, ifindex := range todo {
		if f.ports.settle(ifindex) && f.started {
			f.onPort(ifindex)
		}
	}
}

// gone removes a device, and the task addresses behind it.
func (f *follower) gone(ifindex int) {
	h := f.ports.remove(ifindex)
	if h == nil && !f.tasks.uses(ifindex) {
		return
	}
	err := f.tasks.dropPort(ifindex)
	if h != nil {
		if h.on != nil {
			err = errors.Join(err, h.on.Close())
		}
		f.log.Info("device gone", zap.String("device", h.name), zap.Int("ifindex", ifindex))
	}
	if err != nil {
		f.log.Error("cannot forget a device", zap.Int("ifindex", ifindex), zap.Error(err))
	}
	if f.started {
		f.onPortGone(ifindex)
	}
}

// wait lets a second pass and reports whether done is still open.
func wait(done <-chan struct{}) bool {
	select {
	case <-done:
		return false
	case <-time.After(time.Second):
		return true
	}
}
