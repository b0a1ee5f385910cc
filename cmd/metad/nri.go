package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/urfave/cli/v3"

	"metad/pkg/docker"
	"metad/pkg/mdfile"
	"metad/pkg/nri"
)

// guardCommand runs this program as the guard of a running metad's NRI connection.
const guardCommand = "nri-guard"

func nriGuardCommand() *cli.Command {
	return &cli.Command{
		Name:   guardCommand,
		Hidden: true,
		Usage:  "relay between the Docker Engine and metad: started by metad",
		Action: func(context.Context, *cli.Command) error { return nri.Guard() },
	}
}

// plugin is metad's NRI plugin of the Docker Engine.
type plugin struct {
	*nri.Plugin
	engine *docker.Client
	files  *mdfile.Writer
	sweeps bool // no proxy does
	// containers cannot read a file that is not relabelled, whatever the Engine says
	forced bool

	selinux atomic.Bool // the Engine says so
}

// newPlugin returns nil if NRI is off.
func (d *daemon) newPlugin() *plugin {
	c := d.cfg
	if c.nri == "off" {
		return nil
	}
	p := &plugin{engine: d.engine, files: d.files, sweeps: c.proxySocket == "",
		forced: c.selinux}
	p.Plugin = nri.New(nri.Config{
		Socket:   c.nriSocket,
		Guard:    []string{"/proc/self/exe", guardCommand},
		Expected: c.nri == "on",
		NoFiles:  func() bool { return p.forced || p.selinux.Load() },
		Log:      d.log.Named("nri"),
	}, d.inject)
	return p
}

// pluginTime is how long a takeover waits for the Engine to connect to the successor's plugin. The
// Engine first finishes the creations that it has begun.
const pluginTime = 3 * time.Second

// startPlugin starts this process's NRI plugin. In a takeover it waits, for pluginTime at most,
// until the Engine has connected to it. Until then the Engine asks the predecessor's plugin.
func (d *daemon) startPlugin(ctx context.Context, parts *parts) {
	p := d.plugin
	if p == nil {
		return
	}
	parts.run(p.Run)
	parts.runLoose("nri", p.keep)
	if d.own.pred == nil || !nri.Listens(p.Socket()) {
		return
	}
	select {
	case <-p.Ready():
	case <-time.After(pluginTime):
		d.log.Warn("NRI plugin not connected to the Docker Engine yet: taking over " +
			"without waiting")
	case <-ctx.Done():
	}
}

// keep asks the Engine what the plugin must not ask during a creation, and removes files of
// containers whose creation failed.
func (p *plugin) keep(ctx context.Context) {
	const every, patience = 30 * time.Second, 10 * time.Second
	tick := time.NewTicker(every)
	defer tick.Stop()
	select {
	case <-p.Ready():
	case <-ctx.Done():
	}
	for ctx.Err() == nil {
		if p.Connected() {
			ask, cancel := context.WithTimeout(ctx, patience)
			// The follower logs what is wrong with the Engine.
			_ = errors.Join(p.askSELinux(ask), p.sweep(ask))
			cancel()
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func (p *plugin) askSELinux(ctx context.Context) error {
	info, err := p.engine.Info(ctx)
	if err != nil {
		return err
	}
	p.selinux.Store(slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return o == "selinux" || o == "name=selinux" ||
			strings.HasPrefix(o, "name=selinux,")
	}))
	return nil
}

func (p *plugin) sweep(ctx context.Context) error {
	if !p.sweeps || !p.files.InDoubt() {
		return nil
	}
	asked := time.Now()
	list, err := p.engine.ContainerList(ctx, container.ListOptions{All: true})
	if err != nil {
		return err
	}
	mounted := make([]mdfile.Mounted, len(list))
	for i, c := range list {
		mounted[i].ID = c.ID
		for _, m := range c.Mounts {
			mounted[i].Sources = append(mounted[i].Sources, m.Source)
		}
	}
	p.files.Sweep(asked, mounted)
	return nil
}
