package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/coreos/go-systemd/v22/dbus"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/pkg/takeover"
)

// This file has what happens between the two processes of `systemctl restart`: the service manager
// keeps what a takeover would hand over, in its file descriptor store. Packets still come to the
// listener, and connections wait there for the next process.

// keptName is the name in the file descriptor store. The unit has it too.
const keptName = "metad"

const (
	// managerTime bounds what the service manager may take to answer.
	managerTime = 5 * time.Second
	// keepDrainTime is how long requests that were accepted before a restart may take. New
	// ones wait as long, if a client leaves its connection open and asks nothing.
	keepDrainTime = 2 * time.Second
)

// unitState is what the service manager says about metad's unit.
type unitState struct {
	restarting bool // it is being stopped in order to be started again
	kept       int  // files in its file descriptor store
}

// askManager returns the state of the unit that this process belongs to. Tests have a manager of
// their own.
var askManager = askSystemd

// askSystemd asks systemd over its private socket, which works without a message bus.
func askSystemd(ctx context.Context) (s unitState, err error) {
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if errors.Is(err, fs.ErrNotExist) { // the service manager is another one
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("ask systemd: %w", err)
	}
	defer c.Close()
	unit, err := c.GetUnitNameByPID(ctx, uint32(os.Getpid()))
	if err != nil {
		return s, fmt.Errorf("ask systemd for the unit: %w", err)
	}
	jobs, err := c.ListJobsContext(ctx)
	if err != nil {
		return s, fmt.Errorf("ask systemd for its jobs: %w", err)
	}
	// A job "restart" becomes a job "start" when the unit has stopped.
	s.restarting = slices.ContainsFunc(jobs, func(j dbus.JobStatus) bool {
		return j.Unit == unit && j.JobType == "restart"
	})
	const property = "NFileDescriptorStore"
	p, err := c.GetUnitTypePropertyContext(ctx, unit, "Service", property)
	if err != nil {
		return s, fmt.Errorf("ask systemd for %s: %w", property, err)
	}
	n, ok := p.Value.Value().(uint32)
	if !ok {
		return s, fmt.Errorf("ask systemd for %s: got %s", property, p.Value)
	}
	s.kept = int(n)
	return s, nil
}

// keepForRestart gives the service manager everything that a successor needs, if it is about to
// start one. It reports whether it has it: then this process changes nothing in the kernel.
func (d *daemon) keepForRestart() bool {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), managerTime)
	defer cancel()
	unit, err := askManager(ctx)
	if err == nil && !unit.restarting {
		return false
	}
	if err == nil {
		err = d.keep(ctx)
	}
	if err != nil {
		d.log.Warn("nothing is kept for a restart: requests until then are not metad's",
			zap.Error(err))
	}
	return err == nil
}

// keep gives the state to the service manager. After an error this process has it alone.
func (d *daemon) keep(ctx context.Context) error {
	f, err := d.keptFile()
	if err != nil {
		return err
	}
	err = store(ctx, f)
	f.Close()
	if err != nil {
		notify(d.log, removeKept)
		return errors.Join(err, d.resume())
	}
	return nil
}

// keptFile returns a file with all that the next metad needs. After an error this one goes on.
func (d *daemon) keptFile() (*os.File, error) {
	state, err := d.offer()
	var f *os.File
	if err == nil {
		f, err = takeover.Keep(d.cfg.takeoverConfig(d.log), state)
	}
	if err != nil {
		return nil, errors.Join(err, d.resume())
	}
	return f, nil
}

// removeKept has the service manager close what it keeps.
const removeKept = "FDSTOREREMOVE=1\nFDNAME=" + keptName

// store returns when the service manager keeps f.
func store(ctx context.Context, f *os.File) error {
	// Without FDPOLL=0 it would drop a socket whose other end is closed.
	if err := notifyWith("FDSTORE=1\nFDPOLL=0\nFDNAME="+keptName, f); err != nil {
		return err
	}
	if err := notifyBarrier(ctx); err != nil {
		return err
	}
	unit, err := askManager(ctx)
	if err == nil && unit.kept == 0 {
		err = errors.New("the service manager keeps no files: FileDescriptorStoreMax is 0")
	}
	return err
}

// leaveKept answers the connections that were accepted here. New ones wait for the next process.
func (d *daemon) leaveKept(parts *parts) error {
	d.log.Info("new connections wait for the next metad")
	d.tasks.to(replaced)
	<-d.endpoint.drainWithin(keepDrainTime)
	d.own.ours = false
	err := d.endpoint.Close()
	if s := d.proxySocket.Load(); s != nil {
		s.Succeed()
	}
	return errors.Join(err, parts.stop())
}

// keptState is what the last metad left for this one.
type keptState struct {
	takeover.State
	bySelf bool // that was this process, before a reload
}

// takeKept returns what the last metad left; nil: nothing. From then on this process alone has it:
// if it is killed, or ends with an error, the kernel removes everything, and the ECS agent answers.
func takeKept(c *config, log *zap.Logger) *keptState {
	var state *keptState
	files, own := activation.Files(true), keptBySelf()
	if len(files) > 0 {
		defer notify(log, removeKept)
	}
	if own != nil {
		files = append(files, own)
	}
	for _, f := range files {
		if f.Name() != keptName || state != nil {
			f.Close()
			continue
		}
		s, err := takeover.Kept(c.takeoverConfig(log), f)
		if err != nil {
			log.Warn("what the last metad left is not used", zap.Error(err))
			continue
		}
		state = &keptState{s, f == own}
	}
	return state
}

// notifyWith sends state and f to the service manager (sd_pid_notify_with_fds(3)).
func notifyWith(state string, f *os.File) error {
	c, err := net.DialUnix("unixgram", nil,
		&net.UnixAddr{Name: os.Getenv("NOTIFY_SOCKET"), Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	defer c.Close()
	to, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	what, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	var serr, cerr error
	cerr = what.Control(func(fd uintptr) {
		// Not WriteMsgUnix, which refuses a socket that is connected.
		err = to.Write(func(sock uintptr) bool {
			serr = unix.Sendmsg(int(sock), []byte(state), unix.UnixRights(int(fd)), nil,
				0)
			return !errors.Is(serr, unix.EAGAIN)
		})
	})
	if err := errors.Join(cerr, err, serr); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// notifyBarrier returns when the service manager has read what was sent before
// (sd_notify_barrier(3)): it closes the file then.
func notifyBarrier(ctx context.Context) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("service manager: %w", err)
	}
	defer r.Close()
	err = notifyWith("BARRIER=1", w)
	w.Close()
	if err != nil {
		return err
	}
	if end, ok := ctx.Deadline(); ok {
		if err := r.SetReadDeadline(end); err != nil {
			return fmt.Errorf("service manager: %w", err)
		}
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for the service manager: %w", err)
	}
	return nil
}

// notify tells the service manager the state of this process, if there is a service manager that
// asks for it (sd_notify(3)).
func notify(log *zap.Logger, state string) {
	if _, err := sd.SdNotify(false, state); err != nil {
		log.Warn("cannot notify the service manager", zap.String("state", state),
			zap.Error(err))
	}
}
