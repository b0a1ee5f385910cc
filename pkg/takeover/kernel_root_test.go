//go:build root

package takeover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"metad/internal/testnet"
	"metad/pkg/loader"
)

// kernelGoods are all that metad has in the kernel of the host whose namespace is file 3.
type kernelGoods struct {
	cfg loader.Config
	l   *loader.Loader
	ln  net.Listener
}

func init() {
	plain := newGoods
	newGoods = func(dir string) goods {
		mode := os.Getenv("TAKEOVER_ATTACH")
		if mode == "" {
			return plain(dir)
		}
		return &kernelGoods{cfg: loader.Config{
			Netns: netns.NsHandle(3), Attach: loader.AttachMode(mode),
			PinDir: os.Getenv("TAKEOVER_PINS"),
		}}
	}
}

func (g *kernelGoods) open() (_ net.Listener, err error) {
	if g.l, err = loader.Open(g.cfg); err != nil {
		return nil, err
	}
	if g.ln, err = g.l.Listen(); err != nil {
		return nil, err
	}
	return g.ln, g.l.Arm()
}

func (g *kernelGoods) adopt(p *Predecessor) (_ net.Listener, err error) {
	g.l, g.ln, err = loader.TakeOver(g.cfg, p.Files, p.Meta)
	return g.ln, err
}

func (g *kernelGoods) offer() (State, error) {
	files, meta, err := g.l.OfferTakeover()
	// Spaces, so that it takes more than one packet and there is a step between them.
	return State{Meta: fmt.Appendf(meta, "%*s", 2*partMeta, ""), Files: files}, err
}

func (g *kernelGoods) resume() {
	if err := g.l.CancelTakeover(); err != nil {
		fmt.Fprintln(os.Stderr, "resume:", err)
	}
}

func (g *kernelGoods) leave(owner bool) error {
	if owner {
		return errors.Join(g.l.Disarm(), g.ln.Close(), g.l.Close())
	}
	return errors.Join(g.ln.Close(), g.l.FinishTakeover())
}

// TestRootCrash is TestCrash with the kernel's part: containers are answered whoever dies,
// whenever.
func TestRootCrash(t *testing.T) {
	f := func(t *testing.T, mode loader.AttachMode) {
		for _, c := range crashSteps {
			for _, step := range c.steps {
				t.Run(c.who+" at "+step, func(t *testing.T) {
					h := testnet.NewHost(t)
					k := h.AddBridge("ecs-bridge", "169.254.172.1/22").AddTask(
						"")
					h.NoLeak()
					// a File closes what it has
					fd, err := unix.FcntlInt(uintptr(h.NS),
						unix.F_DUPFD_CLOEXEC, 0)
					if err != nil {
						t.Fatal(err)
					}
					ns := os.NewFile(uintptr(fd), "host")
					defer ns.Close()
					pins := testnet.PinDir(t)
					crash(t, c.who, step, c.survivor,
						func(string) func() (net.Conn, error) {
							return func() (net.Conn, error) {
								return k.Dial(time.Second)
							}
						}, func(cmd *exec.Cmd) {
							cmd.ExtraFiles = []*os.File{ns}
							cmd.Env = append(cmd.Env,
								"TAKEOVER_ATTACH="+string(mode),
								"TAKEOVER_PINS="+pins)
						})
					for _, name := range h.LinkNames() {
						if name == "metad0" {
							t.Error("metad0 is left")
						}
					}
				})
			}
		}
	}
	t.Run("clsact", func(t *testing.T) { f(t, loader.AttachClsact) })
	t.Run("tcx", func(t *testing.T) { testnet.SkipBefore(t, "6.6"); f(t, loader.AttachTCX) })
}
