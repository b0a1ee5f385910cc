package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
	"github.com/urfave/cli/v3"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
	"metad/pkg/nri"
)

// guardCommand is what this program is as the guard of a running metad's NRI connection.
const guardCommand = "nri-guard"

func nriGuardCommand() *cli.Command {
	return &cli.Command{
		Name:   guardCommand,
		Hidden: true,
		Usage:  "relay between the Docker Engine and metad: started by metad",
		Action: func(context.Context, *cli.Command) error { return nri.Guard() },
	}
}

// injectConfig is what containers get, by the proxy and by NRI.
func (d *daemon) injectConfig() inject.Config {
	return inject.Config{File: d.cfg.fileEnabled, URIs: d.cfg.metadataURIs, Identify: d.follower.Identify}
}

// plugin is metad as a plugin of the Docker Engine.
type plugin struct {
	*nri.Plugin
	engine *client.Client
	files  *mdfile.Writer
	sweeps bool // no proxy does
	forced bool // containers cannot read a file that is not relabelled, whatever the Engine says

	selinux atomic.Bool // the Engine says so
}

// newPlugin returns nil if there is to be none.
func (d *daemon) newPlugin(engine *client.Client) *plugin {
	if d.cfg.nri == "off" {
		return nil
	}
	p := &plugin{engine: engine, files: d.files, sweeps: d.cfg.proxySocket == "", forced: d.cfg.selinux}
	p.Plugin = nri.New(nri.Config{
		Socket:   d.cfg.nriSocket,
		Guard:    []string{"/proc/self/exe", guardCommand},
		Expected: d.cfg.nri == "on",
		NoFiles:  func() bool { return p.forced || p.selinux.Load() },
		Log:      d.log.Named("nri"),
	}, inject.New(d.injectConfig(), d.files))
	return p
}

// start runs the plugin. After a takeover it waits a moment until the Engine asks this process: the other is asked
// until then.
func (p *plugin) start(ctx context.Context, run func(func(context.Context) error), takeover bool) {
	run(p.Run)
	run(p.keep)
	if !takeover || !nri.Listens(p.Socket()) {
		return
	}
	select {
	case <-p.Ready():
	case <-time.After(time.Second):
	case <-ctx.Done():
	}
}

// keep asks the Engine what the plugin cannot ask while a creation waits, and removes files whose container was
// not created after all.
func (p *plugin) keep(ctx context.Context) error {
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
			_ = errors.Join(p.askSELinux(ask), p.sweep(ask)) // the follower says what is wrong with the Engine
			cancel()
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	return nil
}

func (p *plugin) askSELinux(ctx context.Context) error {
	info, err := p.engine.Info(ctx)
	if err != nil {
		return err
	}
	p.selinux.Store(slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return o == "selinux" || o == "name=selinux" || strings.HasPrefix(o, "name=selinux,")
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
