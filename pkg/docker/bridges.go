package docker

import (
	"context"
	"slices"
	"time"

	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/api/types/network"
	"go.uber.org/zap"
)

const networksTimeout = 30 * time.Second

// bridges reports the bridge devices of the Engine's networks. It asks the Engine in its own
// goroutine, so that nothing waits for the answer.
type bridges struct {
	engine Engine
	log    *zap.Logger
	tell   func([]string)
	ask    chan struct{} // holds one token while there is something to ask for
}

func newBridges(engine Engine, log *zap.Logger, tell func([]string)) *bridges {
	return &bridges{engine: engine, log: log, tell: tell, ask: make(chan struct{}, 1)}
}

// changed has the networks listed again. It never blocks.
func (b *bridges) changed() {
	select {
	case b.ask <- struct{}{}:
	default:
	}
}

// run reports the bridges after each change, until ctx ends. If the Engine does not answer, run
// asks again at the next change or reconcile.
func (b *bridges) run(ctx context.Context) {
	var told []string
	var trouble trouble
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.ask:
		}
		names, err := b.list(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if trouble.isNew(err) {
				b.log.Warn("networks not listed: watching the bridges known so far",
					zap.Error(err))
			}
			continue
		}
		trouble = nil
		if told == nil || !slices.Equal(names, told) {
			told = names
			b.tell(slices.Clone(names))
		}
	}
}

// list returns the devices, sorted by name.
func (b *bridges) list(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, networksTimeout)
	defer cancel()
	networks, err := b.engine.NetworkList(ctx,
		network.ListOptions{Filters: filters.NewArgs(filters.Arg("driver", "bridge"))})
	if err != nil {
		return nil, err
	}
	names := []string{}
	for i := range networks {
		if name := bridgeName(&networks[i]); name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// bridgeName returns the device of a bridge network: the name in its options, or br- and the
// beginning of its id (moby: daemon/libnetwork/drivers/bridge, parseNetworkOptions).
func bridgeName(n *network.Summary) string {
	if name := n.Options["com.docker.network.bridge.name"]; name != "" {
		return name
	}
	const short = 12
	if n.Driver != "bridge" || len(n.ID) < short {
		return ""
	}
	return "br-" + n.ID[:short]
}

// trouble holds the errors since the last success, so that each is logged once.
type trouble map[string]bool

func (t *trouble) isNew(err error) bool {
	const most = 16 // errors whose text always differs are not worth a line each
	if (*t)[err.Error()] || len(*t) == most {
		return false
	}
	if *t == nil {
		*t = trouble{}
	}
	(*t)[err.Error()] = true
	return true
}
