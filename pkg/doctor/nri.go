package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
)

// checkNRI reports whether the Docker Engine asks metad by NRI what to put into new containers,
// and if not, how to turn that on. It is no fault if it does not: the proxy is the other way.
func checkNRI(ctx context.Context, cfg Config, h *host) []Check {
	const name = "nri"
	var info struct {
		ServerVersion string
		NRI           *struct{ Info [][2]string }
	}
	status, body, err := h.get(ctx, dockerURL(cfg.DockerHost)+"/info")
	if err != nil || status != 200 || json.Unmarshal(body, &info) != nil {
		return nil // the check of Docker has said it
	}
	var major, minor int
	fmt.Sscanf(info.ServerVersion, "%d.%d", &major, &minor)
	if major < 29 || major == 29 && minor < 2 {
		return one(name, OK, "Docker "+info.ServerVersion+" has none (29.2 has): "+
			"containers get their file and the endpoint's address by the proxy", "")
	}
	socket, listens := "", false
	if info.NRI != nil {
		for _, pair := range info.NRI.Info {
			if pair[0] == "socket-path" {
				socket, listens = pair[1], pair[1] != ""
			}
		}
	}
	switch {
	case !listens:
		return one(name, OK, fmt.Sprintf(
			"off: containers get their file and the endpoint's address by the proxy "+
				"only; "+
				`to turn it on, put "nri-opts": {"enable": true, "socket-path": %q} `+
				"into /etc/docker/daemon.json and reload dockerd", cfg.NRISocket),
			"")
	case socket != cfg.NRISocket:
		found := fmt.Sprintf("Docker's socket is %s, metad looks for %s", socket,
			cfg.NRISocket)
		return one(name, Warn, found, "set --nri-socket "+socket)
	}
	if cfg.AdminSocket == "" {
		return one(name, OK, "on, at "+socket, "")
	}
	_, metrics, err := h.get(ctx, "unix://"+cfg.AdminSocket+":/metrics")
	if err == nil && !strings.Contains(string(metrics), "metad_nri_connected 1") {
		return one(name, Warn, "on, at "+socket+", but metad is not connected",
			"look for nri in metad's log; is --nri off?")
	}
	return one(name, OK, "on, at "+socket, "")
}
