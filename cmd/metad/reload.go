package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// This file has what SIGHUP does. metad reads its flags, variables and file again. If they are
// valid and differ, it executes itself anew in the same process, and takes over from itself what
// another metad would take over: so every flag takes effect by the code of a start, and
// connections wait meanwhile.

// keptFD in the environment is the number of the file with the state that metad left to itself.
const keptFD = "METAD_KEPT_FD"

// needRestart are the flags of fixedFlags.
var needRestart = []string{"attach", "max-addresses", "on-exit", "pin-dir"}

// parseServe returns the configuration of `metad serve` with args, those of the process.
func parseServe(args []string) (*config, error) {
	i := slices.Index(args, "serve")
	if i < 0 {
		return nil, errors.New("not started as metad serve")
	}
	c := new(config)
	cmd := &cli.Command{Name: "serve", Flags: c.flags(),
		Writer: io.Discard, ErrWriter: io.Discard,
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
		OnUsageError: func(_ context.Context, _ *cli.Command, err error, _ bool) error {
			return err
		},
		Action: func(_ context.Context, cmd *cli.Command) error {
			c.noteValues(cmd)
			return c.validate()
		}}
	if err := cmd.Run(context.Background(), args[i:]); err != nil {
		return nil, err
	}
	engine, err := c.engine()
	if err != nil {
		return nil, err
	}
	return c, engine.Close()
}

// noteValues keeps the value of each flag, for a comparison.
func (c *config) noteValues(cmd *cli.Command) {
	c.values = map[string]string{}
	for _, f := range cmd.Flags {
		name := f.Names()[0]
		c.values[name] = fmt.Sprint(cmd.Value(name))
	}
}

// changes returns the flags that differ from next, sorted: those that a reload changes, and those
// that need a restart.
func (c *config) changes(next *config) (now, later []string) {
	for name, value := range c.values {
		switch {
		case next.values[name] == value:
		case slices.Contains(needRestart, name):
			later = append(later, name)
		default:
			now = append(now, name)
		}
	}
	slices.Sort(now)
	slices.Sort(later)
	return now, later
}

// reload reads the configuration again. It reports whether metad has to execute itself for it. A
// configuration with an error changes nothing.
func (d *daemon) reload(args []string) bool {
	next, err := parseServe(args)
	if err != nil {
		d.log.Error("the new configuration is refused, the old one stays", zap.Error(err))
		return false
	}
	now, later := d.cfg.changes(next)
	d.log.Info("configuration read again", zap.Strings("changed", now),
		zap.Strings("need_restart", later))
	if slices.Equal(now, []string{"log-level"}) {
		d.cfg.values["log-level"] = next.values["log-level"]
		if err := d.cfg.setLevel(next.logLevel); err != nil {
			d.log.Error("log level not changed", zap.Error(err))
		}
		return false
	}
	return len(now) > 0
}

// hangups returns the process's SIGHUPs; one that comes during a reload is not lost.
func hangups() (_ <-chan os.Signal, stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

// reloading tells the service manager that the next READY=1 is the end of a reload.
func reloading(log *zap.Logger) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		log.Warn("clock", zap.Error(err))
	}
	notify(log, sd.SdNotifyReloading+"\nMONOTONIC_USEC="+
		strconv.FormatInt(t.Nano()/1000, 10))
}

// again deals with a SIGHUP. It returns the file for executeSelf, or nil: this image goes on.
func (d *daemon) again(parts *parts) (*os.File, error) {
	reloading(d.log)
	if !d.reload(os.Args) {
		notify(d.log, sd.SdNotifyReady)
		return nil, nil
	}
	f, err := d.keptFile()
	if err != nil {
		d.log.Error("the new configuration has no effect yet", zap.Error(err))
		notify(d.log, sd.SdNotifyReady)
		return nil, nil
	}
	return f, d.leaveKept(parts)
}

// executeSelf replaces the process's image, with the state in f. It returns only an error.
func executeSelf(f *os.File) error {
	path, err := os.Executable()
	if err != nil || strings.HasSuffix(path, " (deleted)") {
		path = "/proc/self/exe"
	}
	// The copy stays open in the next image.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 0)
	if err != nil {
		return fmt.Errorf("execute metad anew: %w", err)
	}
	// A SIGHUP ends a process that has not asked for it yet.
	signal.Ignore(syscall.SIGHUP)
	env := append(os.Environ(), keptFD+"="+strconv.Itoa(fd))
	return fmt.Errorf("execute metad anew: %w", syscall.Exec(path, os.Args, env))
}

// keptBySelf returns the file that executeSelf has left; nil: none.
func keptBySelf() *os.File {
	fd, err := strconv.Atoi(os.Getenv(keptFD))
	os.Unsetenv(keptFD)
	if err != nil {
		return nil
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), keptName)
}
