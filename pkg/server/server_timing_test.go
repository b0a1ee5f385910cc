package server

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// BenchmarkAnswer: what an answer costs without a socket, one connection for each processor.
func BenchmarkAnswer(b *testing.B) {
	for _, target := range []string{"/v2/metadata", "/v2/metadata/" + idA, "/v2/stats",
		"/v2/stats/" + idA,
		"/v4/task", "/v4/task/stats", "/v4/" + endpointA, "/v4/" + endpointA + "/stats"} {
		b.Run(target, func(b *testing.B) {
			h := newStopped(b, testConfig(), newAwsvpc())
			req := request(target)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				c := newLoopConn(addrT)
				nc, err := (&listener{s: h.Server}).admit(c)
				if err != nil {
					b.Error(err)
					return
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					_ = h.http.ServeConn(nc)
				}()
				for pb.Next() {
					c.get(req)
				}
				close(c.ask)
				<-done
			})
		})
	}
}

// BenchmarkSlowloris: what a task that opens 1,000 connections and sends a byte a second on each
// does to another task's latency, and what is left of it in memory. One iteration is a quiet second
// and one under attack; the ratio is the median of the pairs. Use -benchtime 5x.
func BenchmarkSlowloris(b *testing.B) {
	const attackers = 1000
	h := newHost(b, testConfig(), newTask(), newOther())
	var ratios, quiets, attacks []float64
	heap := func() float64 {
		runtime.GC() // twice: what is in a pool survives one
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapInuse + m.StackInuse)
	}
	victimP99(b, h.addr) // warm
	before, goroutines := heap(), runtime.NumGoroutine()
	for range b.N {
		quiet := victimP99(b, h.addr)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for range attackers {
			wg.Go(func() { slowloris(ctx, h.addr, addrT) })
		}
		eventually(b, "attack is on", func() bool { return h.Counters().Open >= h.cfg.MaxConnsPerTask })
		attacked := victimP99(b, h.addr)
		cancel()
		wg.Wait()
		ratios = append(ratios, attacked/quiet)
		quiets, attacks = append(quiets, quiet), append(attacks, attacked)
	}
	eventually(b, "attack is over", func() bool { return h.Counters().Open == 0 && runtime.NumGoroutine() <= goroutines })
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(quiets)/1e3, "quiet-p99-µs")
	b.ReportMetric(median(attacks)/1e3, "attacked-p99-µs")
	b.ReportMetric(median(ratios), "p99-ratio")
	b.ReportMetric((heap()-before)/1024, "retained-KiB")
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// victimP99 asks as B's task for a second over one connection, and returns the 99th percentile in
// ns.
func victimP99(b *testing.B, addr string) float64 {
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: addrB.AsSlice()}}).Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	req := request("/v2/metadata")
	var took []time.Duration
	for start := time.Now(); time.Since(start) < time.Second; {
		t := time.Now()
		_, _ = c.Write(req)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 200 {
			b.Fatal(resp, err)
		}
		if _, err := r.Discard(int(resp.ContentLength)); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(t))
	}
	slices.Sort(took)
	return float64(took[len(took)*99/100])
}

// slowloris is one connection of the attack: a byte a second, and again when it is thrown out.
func slowloris(ctx context.Context, addr string, from netip.Addr) {
	second := func() bool {
		select {
		case <-time.After(time.Second):
			return true
		case <-ctx.Done():
			return false
		}
	}
	for {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}).DialContext(
			ctx, "tcp", addr)
		for err == nil {
			if _, err = c.Write([]byte("G")); err == nil && !second() {
				_ = c.Close()
				return
			}
		}
		if c != nil {
			_ = c.Close()
		}
		if !second() {
			return
		}
	}
}
