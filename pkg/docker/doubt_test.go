package docker

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"metad/pkg/task"
)

// TestChangedMAC: a container whose packets come from another MAC is looked at when that is told,
// and has its new MAC at once.
func TestChangedMAC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		id, other := d.run(), d.run()
		o := observe(t, d, nil)
		<-o.Synced()
		var mac atomic.Uint32
		var reads, others atomic.Int32
		o.read = func(c *task.Container) (*namespace, error) {
			ns, err := fakeNamespace(c)
			if c.ID == other {
				others.Add(1)
			} else {
				reads.Add(1)
				ns.endpoints[0].MAC[5] = byte(mac.Load())
			}
			return ns, err
		}
		before, _ := find(o.last(), id)
		for n := range uint32(20) { // as often as it likes
			time.Sleep(time.Second)
			mac.Store(100 + n)
			o.WrongMAC(before.Endpoints[0].Addr)
			synctest.Wait()
			now, _ := find(o.last(), id)
			if got := now.Endpoints[0].MAC[5]; got != byte(100+n) {
				t.Fatalf("change %d: got MAC %d, want %d at once", n, got, 100+n)
			}
		}
		if reads.Load() != 20 || others.Load() != 0 {
			t.Errorf("%d looks, and %d at another, want one for each change",
				reads.Load(), others.Load())
		}
		o.end(t)
	})
}

// TestMadeUpMACs: a container that sends from made-up MACs without end is looked at a few times in
// ten minutes, which tell nothing new; when it really changes its MAC it waits a minute at most.
// After some minutes of silence it is looked at at once again.
func TestMadeUpMACs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		id := d.run()
		o := observe(t, d, nil, func(c *Config) { c.ReconcileEvery = 24 * time.Hour })
		<-o.Synced()
		var reads, mac atomic.Int32
		tk, c := find(o.last(), id)
		mac.Store(int32(tk.Endpoints[0].MAC[5]))
		o.read = func(c *task.Container) (*namespace, error) {
			reads.Add(1)
			ns, err := fakeNamespace(c)
			ns.endpoints[0].MAC[5] = byte(mac.Load())
			return ns, err
		}
		addr := tk.Endpoints[0].Addr
		for range 6000 {
			o.WrongMAC(addr)
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		if got := reads.Load(); got < 8 || got > 16 {
			t.Errorf("%d looks in ten minutes, want 8 to 16", got)
		}
		if now, again := find(o.last(), id); now != tk || again != c {
			t.Error("the task has changed")
		}
		mac.Store(77)
		for range 61 {
			o.WrongMAC(addr)
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if now, _ := find(o.last(), id); now.Endpoints[0].MAC[5] != 77 {
			t.Error("a MAC that has changed is not known after a minute")
		}
		time.Sleep(3 * time.Minute)
		before := reads.Load()
		o.WrongMAC(addr)
		synctest.Wait()
		if reads.Load() != before+1 {
			t.Errorf("%d looks at once, want 1", reads.Load()-before)
		}
		o.end(t)
	})
}
