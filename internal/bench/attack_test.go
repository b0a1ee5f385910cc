//go:build bench

package bench

import (
	"bufio"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"metad/internal/testnet"
)

// attacks are the attacks of one container on the endpoint, on its own connections. Each runs
// until its process is killed.
var attacks = map[string]func(victim netip.Addr) error{
	// what the machine's noise alone does to the figures
	"nothing":                           func(netip.Addr) error { select {} },
	"128 connections that read nothing": func(netip.Addr) error { return each(128, readNothing) },
	"8 connections that pipeline":       func(netip.Addr) error { return each(8, pipeline) },
	"128 stalled uploads": func(netip.Addr) error {
		return each(128,
			stall("POST /v1/credentials HTTP/1.1\r\nHost: x\r\nContent-Length: "+
				"1000000\r\n\r\n"))
	},
	"128 streams": func(netip.Addr) error {
		return each(128, stall("GET /v2/metadata?stream=true HTTP/1.1\r\nHost: x\r\n\r\n"))
	},
	"256 requests of an unknown source": func(netip.Addr) error { return each(256, stall("GET /v2/metadata HTTP/1.1\r\nHost: x\r\n\r\n")) },
	"SYNs, each left alone":             func(netip.Addr) error { return synFlood(netip.Addr{}) },
	"SYNs from a neighbour's address":   synFlood,
}

// each runs f again and again in n goroutines, each after a pause when it fails.
func each(n int, f func() error) error {
	for range n {
		go func() {
			for {
				if f() != nil {
					time.Sleep(20 * time.Millisecond)
				}
			}
		}()
	}
	select {}
}

// open connects with a receive buffer of so many bytes; 0: as usual.
func open(buffer int) (net.Conn, error) {
	d := net.Dialer{Timeout: time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			if buffer > 0 {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF,
					buffer)
			}
		})
	}}
	d.SetMultipathTCP(false)
	return d.Dial("tcp4", testnet.Endpoint)
}

var batch = []byte(strings.Repeat("GET /v2/metadata HTTP/1.1\r\nHost: x\r\n\r\n", 1600))

func readNothing() error {
	c, err := open(4096)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = c.Write(batch)
	time.Sleep(10 * time.Second)
	return err
}

// pipeline sends requests without waiting, and the kernel discards the answers.
func pipeline() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// EINPROGRESS
	_ = unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{169, 254, 170, 2}})
	time.Sleep(100 * time.Millisecond)
	sink := make([]byte, 1<<20)
	for out := batch; ; time.Sleep(5 * time.Millisecond) {
		n, err := unix.Write(fd, out)
		switch {
		case err == nil:
			if out = out[n:]; len(out) == 0 {
				out = batch
			}
		case err != unix.EAGAIN:
			return err
		}
		for {
			if n, _, err := unix.Recvfrom(fd, sink, unix.MSG_TRUNC); err != nil ||
				n == 0 {
				break
			}
		}
	}
}

// stall sends request, and reads no answer until the connection ends.
func stall(request string) func() error {
	return func() error {
		c, err := open(0)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte(request)); err != nil {
			return err
		}
		b := make([]byte, 4096)
		for err == nil {
			_, err = c.Read(b)
		}
		return err
	}
}

// synFlood begins connections and forgets them, from another's address if it is valid.
func synFlood(from netip.Addr) error {
	for {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if from.IsValid() {
			if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT,
				1); err != nil {
				return err
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}); err != nil {
				return err
			}
		}
		// EINPROGRESS
		_ = unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{169, 254, 170, 2}})
		unix.Close(fd)
		time.Sleep(100 * time.Microsecond)
	}
}

func attackRole() error {
	var victim netip.Addr
	if err := config(&victim); err != nil {
		return err
	}
	var once sync.Once
	return commands(func(name string) (any, error) {
		once.Do(func() {
			go func() {
				if err := attacks[name](victim); err != nil {
					fmt.Fprintln(os.Stderr, name+":", err)
					os.Exit(1)
				}
			}()
		})
		time.Sleep(time.Second)
		return name, nil
	})
}

// glance is what a bystander saw. It sends a request every 10 ms, each on a new connection.
type glance struct {
	Errors int
	Took   []time.Duration
}

// percentile returns the time within which that part of the answers came.
func (g glance) percentile(part float64) time.Duration {
	took := slices.Sorted(slices.Values(g.Took))
	return took[int(float64(len(took)-1)*part)]
}

func (g *glance) add(more glance) {
	g.Errors += more.Errors
	g.Took = append(g.Took, more.Took...)
}

func bystanderRole() error {
	return commands(func(seconds string) (any, error) {
		s, err := strconv.ParseFloat(seconds, 64)
		if err != nil {
			return nil, err
		}
		return look(time.Duration(s * float64(time.Second))), nil
	})
}

func look(during time.Duration) (g glance) {
	br := bufio.NewReader(nil)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(during); time.Now().Before(end); <-tick.C {
		begin := time.Now()
		err := func() error {
			c, err := open(0)
			if err != nil {
				return err
			}
			defer c.Close()
			br.Reset(c)
			_ = c.SetDeadline(begin.Add(5 * time.Second))
			_, err = c.Write(
				[]byte("GET /v2/metadata HTTP/1.1\r\nHost: 169.254.170.2\r\n\r\n"))
			if err != nil {
				return err
			}
			return readAnswer(br)
		}()
		if err != nil {
			g.Errors++
		}
		g.Took = append(g.Took, time.Since(begin))
	}
	return g
}

// attackRounds is how often the bystander is looked at without and with the attack, in turns: the
// noise of a machine comes and goes, and falls on both sides.
const attackRounds = 3

// underAttack is what an attack did to a bystander, and what it cost, as parts of a core.
type underAttack struct {
	quiet, loud           glance
	attackerCPU, metadCPU float64
}

// TestBenchAttacks prints what each attack of one container does to another one's answers, and what
// it costs: the bystander's times under the attack against those of the same bystander without it.
// ATTACK_SECONDS is how long the attack lasts in all its rounds, ATTACK a part of its name.
func TestBenchAttacks(t *testing.T) {
	seconds := 15.0
	if text := os.Getenv("ATTACK_SECONDS"); text != "" {
		var err error
		if seconds, err = strconv.ParseFloat(text, 64); err != nil {
			t.Fatal("ATTACK_SECONDS: ", err)
		}
	}
	g := newGround(t)
	g.set("arm")
	unknown := g.bridge.AddTask("") // whom no set of tasks has
	bystander := start(t, "bystander", taskOf(g.tasks[0]), 1, nil)
	measure := func() (out glance) {
		bystander.do(fmt.Sprint(seconds/attackRounds), &out)
		return out
	}
	measure() // warm
	fmt.Printf("\nwhat an attack does to another task that asks every 10 ms, %g s each\n",
		seconds)
	fmt.Printf("%-36s %10s %10s %10s %10s %8s %14s %14s\n", "", "p50", "× quiet", "p99",
		"× quiet", "errors", "attacker CPU", "metad CPU")
	for _, name := range slices.Sorted(maps.Keys(attacks)) {
		if !strings.Contains(name, os.Getenv("ATTACK")) {
			continue
		}
		from := g.tasks[1]
		if strings.Contains(name, "unknown") {
			from = unknown
		}
		var u underAttack
		for range attackRounds {
			u.round(t, g, name, from, measure)
		}
		ratio := func(part float64) float64 {
			return float64(u.loud.percentile(part)) / float64(u.quiet.percentile(part))
		}
		fmt.Printf("%-36s %10v %10.2f %10v %10.2f %8d %14.2f %14.2f\n", name,
			u.loud.percentile(0.5).Round(time.Microsecond), ratio(0.5),
			u.loud.percentile(0.99).Round(time.Microsecond), ratio(0.99),
			u.loud.Errors, u.attackerCPU, u.metadCPU)
	}
}

// round measures once without and once with the attack.
func (u *underAttack) round(t *testing.T, g *ground, name string, from *testnet.Task,
	measure func() glance) {
	t.Helper()
	u.quiet.add(measure())
	attacker := start(t, "attack", taskOf(from), 1, g.tasks[0].Addr)
	var began string
	attacker.do(name, &began)
	a0, m0, t0 := attacker.cpuTime(), g.metad.cpuTime(), time.Now()
	u.loud.add(measure())
	took := time.Since(t0).Seconds() * attackRounds
	u.attackerCPU += (attacker.cpuTime() - a0).Seconds() / took
	u.metadCPU += (g.metad.cpuTime() - m0).Seconds() / took
	if err := attacker.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
}
