package docker

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/docker/docker/api/types/container"

	"metad/pkg/task"
)

// TestStrayAddress: the address that a port has had from the beginning is its own, whatever the
// container adds to it or puts in its place; also for a metad that has only been told of it.
func TestStrayAddress(t *testing.T) {
	own, next := netip.MustParseAddr("169.254.172.9"), netip.MustParseAddr("169.254.172.3")
	endpoints := func(addrs ...netip.Addr) (eps []task.Endpoint) {
		for _, a := range addrs {
			eps = append(eps, task.Endpoint{Addr: a, Ifindex: 7})
		}
		slices.SortFunc(eps, compareEndpoints)
		return eps
	}
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		id := d.run(func(c *container.InspectResponse) {
			c.HostConfig.NetworkMode, c.NetworkSettings.Networks = "none", nil
		})
		var has atomic.Pointer[[]task.Endpoint]
		set := func(addrs ...netip.Addr) { eps := endpoints(addrs...); has.Store(&eps) }
		set(own)
		d.setUp = func(f *Follower) {
			f.read = func(*task.Container) (*namespace, error) {
				return &namespace{endpoints: slices.Clone(*has.Load()), inode: 1},
					nil
			}
		}
		o := observe(t, d, nil)
		<-o.Synced()
		check := func(o *observed, what string, strays uint64, want ...netip.Addr) {
			t.Helper()
			o.PortChanged(7)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			tk, _ := find(o.last(), id)
			var got []netip.Addr
			for _, ep := range tk.Endpoints {
				got = append(got, ep.Addr)
			}
			if !slices.Equal(got, want) || o.Status().Strays != strays {
				t.Errorf("%s: got %v and %d strays, want %v and %d", what, got,
					o.Status().Strays, want, strays)
			}
		}
		check(o, "at first", 0, own)
		set(own, next)
		check(o, "another one added", 1, own)
		check(o, "looked at again", 1, own)
		restored := o.last()
		set(next)
		check(o, "another one in its place", 1)
		check(o, "looked at again", 1)
		set(own)
		check(o, "its own again", 1, own)
		o.end(t)
		set(own, next)
		o = observe(t, d, restored)
		<-o.Synced()
		check(o, "after a restart", 1, own)
		o.end(t)
	})
}
