package nri

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The guard's descriptors: the Engine's connection and metad's.
const (
	engineFD = 3
	metadFD  = 4
)

// Guard relays between the Engine and metad until either hangs up, and hangs up itself if metad
// leaves the Engine without an answer for answerTime: a metad that is stopped or hangs cannot do
// that for itself. It is the main function of a process of its own, whose descriptors 3 and 4 are
// the two connections.
func Guard() error { return guard(answerTime) }

func guard(limit time.Duration) error {
	var conns [2]net.Conn
	for i, fd := range []uintptr{engineFD, metadFD} {
		f := os.NewFile(fd, "connection")
		c, err := net.FileConn(f)
		if err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
		f.Close()
		conns[i] = c
	}
	return relay(conns[0], conns[1], limit)
}

// errNoAnswer is the end of a relay whose metad did not answer.
var errNoAnswer = errors.New("no answer in time")

// relay copies both ways until one side ends, and then ends the other. Whatever the engine sends
// (it has one request out at a time) must be followed by something of metad's within limit.
func relay(engine, metad net.Conn, limit time.Duration) error {
	hangUp := func() {
		engine.Close()
		metad.Close()
	}
	defer hangUp()
	late := make(chan struct{})
	timer := time.AfterFunc(limit, func() {
		close(late)
		hangUp()
	})
	timer.Stop()
	done := make(chan error, 2)
	go func() { done <- forward(metad, engine, func() { timer.Reset(limit) }) }()
	go func() { done <- forward(engine, metad, func() { timer.Stop() }) }()
	err := <-done
	hangUp()
	<-done
	timer.Stop()
	select {
	case <-late:
		return errNoAnswer
	default:
	}
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func forward(to, from net.Conn, seen func()) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			seen()
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
}

// startGuard starts a guard for the engine's connection and returns metad's end. The guard ends
// with either.
func (p *Plugin) startGuard(engine *net.UnixConn) (net.Conn, *exec.Cmd, error) {
	file, err := engine.File()
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "nri"), os.NewFile(uintptr(pair[1]), "guard")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(p.cfg.Guard[0], p.cfg.Guard[1:]...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GOGC=off")
	cmd.ExtraFiles = []*os.File{file, theirs}
	// A session of its own: what stops metad's process group must not stop the guard.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("start the guard: %w", err)
	}
	return conn, cmd, nil
}
