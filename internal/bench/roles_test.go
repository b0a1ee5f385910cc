//go:build bench

package bench

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/valyala/fasthttp"
	"go.uber.org/zap"

	"metad/internal/testnet"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/server"
	"metad/pkg/task"
)

// metadConfig is what the metad role serves: real packages, tasks by hand.
type metadConfig struct {
	PinDir string
	Tasks  []*task.Task
}

func metadRole() error {
	var cfg metadConfig
	if err := config(&cfg); err != nil {
		return err
	}
	for _, t := range cfg.Tasks {
		for _, c := range t.Containers {
			c.Stats = &task.StatsCell{}
			c.Stats.Store(&task.Sample{JSON: []byte(sampleJSON),
				V2: len(sampleJSON) - 1, Read: time.Now()})
		}
	}
	var table *lookup.Table
	ld, err := loader.Open(loader.Config{PinDir: cfg.PinDir})
	if err != nil {
		return err
	}
	defer ld.Close()
	table = lookup.New(ld, zap.NewNop())
	if err := table.Apply(cfg.Tasks); err != nil {
		return err
	}
	sc := server.DefaultConfig()
	sc.AgentURL = ""
	sc.Busy = func(tag uint32) {
		if err := ld.Busy(tag); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	srv, err := server.New(sc, table)
	if err != nil {
		return err
	}
	ln, err := ld.Listen()
	if err != nil {
		return err
	}
	go srv.Serve(ln) //nolint:errcheck // ends with the process
	return commands(func(c string) (any, error) {
		switch c {
		case "arm":
			return "armed", ld.Arm()
		case "disarm":
			return "disarmed", ld.Disarm()
		case "rss":
			// what is held, not what the collector has not got to yet
			debug.FreeOSMemory()
			return rss()
		}
		return nil, fmt.Errorf("unknown command %q", c)
	})
}

func rss() (int, error) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	return pages * os.Getpagesize(), err
}

// floorConfig is how long the floor's answers are, by path.
type floorConfig struct {
	Addr    string
	Lengths map[string]int
}

// floorRole is a fasthttp server of fixed bytes, the least that any server with it does.
func floorRole() error {
	var cfg floorConfig
	if err := config(&cfg); err != nil {
		return err
	}
	bodies := map[string][]byte{}
	for path, n := range cfg.Lengths {
		bodies[path] = []byte(strings.Repeat("x", n))
	}
	ln, err := net.Listen("tcp4", cfg.Addr)
	if err != nil {
		return err
	}
	go fasthttp.Serve(ln,
		func(ctx *fasthttp.RequestCtx) { //nolint:errcheck // ends with the process
			ctx.Response.Header.SetContentType("application/json")
			ctx.Response.SetBodyRaw(bodies[string(ctx.Path())])
		})
	return commands(func(string) (any, error) { return "", nil })
}

// sinkRole counts what it is sent on port 9000; sourceRole sends to an address as fast as it can
// for a number of seconds and prints bytes per second.
func sinkRole() error {
	ln, err := net.Listen("tcp4", ":9000")
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, c) //nolint:errcheck // ends with the connection
		}
	}()
	return commands(func(string) (any, error) { return "", nil })
}

func sourceRole() error {
	return commands(func(c string) (any, error) {
		var (
			addr    string
			seconds float64
			sent    int
		)
		if _, err := fmt.Sscan(c, &addr, &seconds); err != nil {
			return nil, err
		}
		conn, err := net.Dial("tcp4", addr)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		b := make([]byte, 1<<18)
		begin := time.Now()
		for time.Since(begin).Seconds() < seconds {
			n, err := conn.Write(b)
			if sent += n; err != nil {
				return nil, err
			}
		}
		return float64(sent) / time.Since(begin).Seconds(), nil
	})
}

// load is one run of the client, and its result.
type load struct {
	Conns     int
	KeepAlive bool
	Seconds   float64
	Path      string
	// result
	Requests, Errors int
	Elapsed          time.Duration
	P50, P99         time.Duration
}

func clientRole() error {
	return commands(func(c string) (any, error) {
		var l load
		if err := json.Unmarshal([]byte(c), &l); err != nil {
			return nil, err
		}
		return l, l.run()
	})
}

// run drives the endpoint from Conns goroutines for Seconds, each waiting for its answer.
func (l *load) run() error {
	var (
		mu  sync.Mutex
		wg  sync.WaitGroup
		all []time.Duration
	)
	request := []byte("GET " + l.Path + " HTTP/1.1\r\nHost: 169.254.170.2\r\n\r\n")
	if !l.KeepAlive {
		request = []byte("GET " + l.Path +
			" HTTP/1.1\r\nHost: 169.254.170.2\r\nConnection: close\r\n\r\n")
	}
	begin := time.Now()
	end := begin.Add(time.Duration(l.Seconds * float64(time.Second)))
	for range l.Conns {
		wg.Go(func() {
			var (
				c    net.Conn
				br   = bufio.NewReader(nil)
				took []time.Duration
				errs int
			)
			dialer := net.Dialer{Timeout: 5 * time.Second}
			dialer.SetMultipathTCP(false)
			for time.Now().Before(end) {
				t0 := time.Now()
				err := func() (err error) {
					if c == nil {
						if c, err = dialer.Dial("tcp4",
							testnet.Endpoint); err != nil {
							return err
						}
						br.Reset(c)
					}
					if err := c.SetDeadline(
						t0.Add(10 * time.Second)); err != nil {
						return err
					}
					if _, err := c.Write(request); err != nil {
						return err
					}
					return readAnswer(br)
				}()
				if err != nil {
					errs++
				} else {
					took = append(took, time.Since(t0))
				}
				if (err != nil || !l.KeepAlive) && c != nil {
					c.Close()
					c = nil
				}
			}
			if c != nil {
				c.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			l.Errors += errs
		})
	}
	wg.Wait()
	l.Elapsed = time.Since(begin)
	l.Requests = len(all)
	slices.Sort(all)
	if len(all) > 0 {
		l.P50, l.P99 = all[len(all)/2], all[len(all)*99/100]
	}
	return nil
}

// readAnswer reads one answer with a Content-Length and throws it away.
func readAnswer(br *bufio.Reader) error {
	length := -1
	for first := true; ; first = false {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return err
		}
		if first && string(line[:12]) != "HTTP/1.1 200" {
			return fmt.Errorf("got %q", line)
		}
		if len(line) == 2 {
			break
		}
		const name = "Content-Length: "
		if len(line) > len(name) && string(line[:len(name)]) == name {
			if length, err = strconv.Atoi(
				string(line[len(name) : len(line)-2])); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return fmt.Errorf("no Content-Length")
	}
	_, err := br.Discard(length)
	return err
}

// slowRole opens connections and sends a byte a second on each, for ever.
func slowRole() error {
	return commands(func(c string) (any, error) {
		n, err := strconv.Atoi(c)
		if err != nil {
			return nil, err
		}
		var wg sync.WaitGroup
		for range n {
			wg.Go(func() {
				const request = "GET /v2/metadata HTTP/1.1\r\nHost: " +
					"169.254.170.2\r\nX-Slow: "
				for { // cut off: again
					c, err := net.DialTimeout("tcp4", testnet.Endpoint,
						2*time.Second)
					for i := 0; err == nil; i++ {
						_, err = c.Write(
							[]byte{(request + strings.Repeat("x",
								i+1))[i]})
						time.Sleep(time.Second)
					}
					if c != nil {
						c.Close()
					}
					time.Sleep(time.Second)
				}
			})
		}
		time.Sleep(2 * time.Second)
		return n, nil
	})
}
