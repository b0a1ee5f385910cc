//go:build root

package loader

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"go.uber.org/zap"

	"metad/internal/testnet"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// Addresses go from container to container within a millisecond, under metad's own table of tasks,
// and each client is told its own task's id: known before it asks, just then, or while its
// predecessor is still believed in. The ports are there all the time, only the kernel's word that
// one went is made up.
func TestRootReuses(t *testing.T) {
	const reuses, addrs, portsPerAddr = 5000, 4, 4
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	l := open(t, h, Config{Log: zap.NewNop()})
	table := lookup.New(l, zap.NewNop())
	ln, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	testnet.ServeOn(t, ln, func(c net.Conn, _ *http.Request) string {
		tag, err := testnet.Mark(c)
		if err != nil {
			return err.Error()
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		v := table.Await(ctx, tag, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr())
		if v == nil {
			return "nobody"
		}
		return v.Task.ID
	})
	var mu sync.Mutex // guards what follows, and is held while tasks are published
	current := map[netip.Addr]*task.Task{}
	right, wrong, failed := 0, 0, 0
	apply := func(addr netip.Addr, tk *task.Task) {
		mu.Lock()
		defer mu.Unlock()
		delete(current, addr)
		if tk != nil {
			current[addr] = tk
		}
		if err := table.Apply(slices.SortedFunc(maps.Values(current),
			func(a, b *task.Task) int {
				return cmp.Compare(a.ARN, b.ARN)
			})); err != nil {
			t.Error(err)
		}
	}
	gone := func(ifindex int) {
		if err := l.tasks.dropPort(ifindex); err != nil {
			t.Error(err)
		}
	}
	pools := make([][]*testnet.Task, addrs)
	for a := range pools {
		for range portsPerAddr {
			k := b.AddTask("")
			testnet.Until(t, "the port is hooked", func() bool {
				return hooked(l, k.Ifindex)
			})
			k.DropAddr()
			pools[a] = append(pools[a], k)
		}
	}
	if err := l.Arm(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for a, ports := range pools {
		addr := netip.AddrFrom4([4]byte{169, 254, 173, byte(a)})
		wg.Go(func() {
			for i := range reuses / addrs {
				k := ports[i%len(ports)]
				k.TakeAddr(addr)
				id := fmt.Sprintf("reuse-%d-%d", a, i)
				tk := &task.Task{ID: id,
					ARN: "arn:aws:ecs:us-west-2:111122223333:task/default/" +
						id,
					Endpoints: []task.Endpoint{{Addr: addr, Ifindex: k.Ifindex,
						MAC: k.MAC}}}
				var late sync.WaitGroup
				switch i % 3 {
				case 0:
					apply(addr, tk)
				case 1:
					apply(addr, nil)
					fallthrough
				case 2: // the one before is still in the table
					late.Go(func() { apply(addr, tk) })
				}
				_, body, err := k.Get("/", timeout)
				late.Wait()
				mu.Lock()
				switch {
				case err != nil:
					failed++
					t.Logf("%s: %v", id, err)
				case body == id:
					right++
				default:
					wrong++
					t.Logf("%s: got %s", id, body)
				}
				mu.Unlock()
				k.DropAddr()
				gone(k.Ifindex)
			}
		})
	}
	wg.Wait()
	t.Logf("%d reuses: %d right, %d wrong, %d not answered", reuses, right, wrong, failed)
	if right != reuses {
		t.Errorf("got %d right, want %d", right, reuses)
	}
}
