package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/go-connections/nat"
)

// Docker's client decodes all of an answer. Of an inspect that is five times what is used here; a
// list of 3,000 containers takes 30 MB for a moment. So answers takes the body of these two,
// decodes the members that are used, and gives Docker's client an empty one.

// answers is the transport of Docker's client. It decodes the body of a request whose context comes
// from decodedBy.
type answers struct{ *http.Transport }

type decodeKey struct{}

// decodedBy returns a context for one call of Docker's client, whose answer decode reads.
func decodedBy(ctx context.Context, decode func(io.Reader) error) context.Context {
	return context.WithValue(ctx, decodeKey{}, decode)
}

// RoundTrip implements http.RoundTripper.
func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := a.Transport.RoundTrip(r)
	decode, _ := r.Context().Value(decodeKey{}).(func(io.Reader) error)
	// The client may negotiate the version first, in the same context.
	if err != nil || decode == nil || resp.StatusCode >= http.StatusBadRequest ||
		!strings.HasSuffix(r.URL.Path, "/json") {
		return resp, err
	}
	err = decode(resp.Body)
	resp.Body.Close()
	resp.Body = decoded{strings.NewReader("null"), err}
	return resp, nil
}

// decoded is an answer's body after it was decoded: null, or why it could not be.
type decoded struct {
	*strings.Reader
	err error
}

// Read implements io.Reader.
func (d decoded) Read(b []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	return d.Reader.Read(b)
}

// Close implements io.Closer.
func (d decoded) Close() error { return nil }

// listAnswer is what is used of one container of a list.
type listAnswer struct {
	ID              string `json:"Id"`
	Names           []string
	State, Status   string
	Mounts          []struct{ Source string }
	NetworkSettings *struct {
		Networks map[string]*struct{ IPAddress string }
	}
}

func (s *listAnswer) docker() container.Summary {
	d := container.Summary{ID: s.ID, Names: s.Names, State: s.State, Status: s.Status}
	for _, m := range s.Mounts {
		d.Mounts = append(d.Mounts, container.MountPoint{Source: m.Source})
	}
	if s.NetworkSettings == nil {
		return d
	}
	d.NetworkSettings = &container.NetworkSettingsSummary{}
	for name, n := range s.NetworkSettings.Networks {
		if d.NetworkSettings.Networks == nil {
			d.NetworkSettings.Networks = map[string]*network.EndpointSettings{}
		}
		d.NetworkSettings.Networks[name] = nil
		if n != nil {
			d.NetworkSettings.Networks[name] = &network.EndpointSettings{
				IPAddress: n.IPAddress}
		}
	}
	return d
}

// decodeList reads a list, one container after the other.
func decodeList(body io.Reader) (list []container.Summary, err error) {
	dec := json.NewDecoder(body)
	begin, err := dec.Token()
	switch {
	case err != nil:
		return nil, err
	case begin == nil: // null
		return nil, nil
	case begin != json.Delim('['):
		return nil, fmt.Errorf("list of containers: %v instead of a list", begin)
	}
	for dec.More() {
		var s listAnswer
		if err := dec.Decode(&s); err != nil {
			return nil, err
		}
		list = append(list, s.docker())
	}
	if _, err = dec.Token(); err != nil { // the end of the connection, and not of the list
		return nil, err
	}
	return list, nil
}

// inspectAnswer is what is used of an inspect.
type inspectAnswer struct {
	ID           string `json:"Id"`
	Created      string
	State        *container.State
	Image        string
	Name         string
	RestartCount int
	HostConfig   *struct {
		LogConfig     container.LogConfig
		NetworkMode   container.NetworkMode
		RestartPolicy container.RestartPolicy
		DNS           []string `json:"Dns"`
		DNSSearch     []string `json:"DnsSearch"`
		CPUShares     int64    `json:"CpuShares"`
		Memory        int64
		NanoCPUs      int64 `json:"NanoCpus"`
		CgroupParent  string
		CPUPeriod     int64 `json:"CpuPeriod"`
		CPUQuota      int64 `json:"CpuQuota"`
	}
	Mounts []struct{ Name, Source, Destination string }
	Config *struct {
		Hostname, Domainname string
		Env                  metadataEnv
		Image                string
		Labels               map[string]string
	}
	NetworkSettings *struct {
		Ports    nat.PortMap
		Networks map[string]*struct {
			MacAddress          string
			Gateway             string
			IPAddress           string
			IPPrefixLen         int
			IPv6Gateway         string
			GlobalIPv6Address   string
			GlobalIPv6PrefixLen int
		}
	}
}

// metadataEnv is those variables of an environment that say where the container's metadata is, as
// KEY=value.
type metadataEnv []string

// metadataPrefix is what their names begin with.
const metadataPrefix = "ECS_CONTAINER_METADATA_"

// UnmarshalJSON implements json.Unmarshaler. Most environments have none. The Engine writes letters
// as they are.
func (e *metadataEnv) UnmarshalJSON(text []byte) error {
	if !bytes.Contains(text, []byte(metadataPrefix)) {
		return nil
	}
	var all []string
	if err := json.Unmarshal(text, &all); err != nil {
		return err
	}
	for _, v := range all {
		if strings.HasPrefix(v, metadataPrefix) {
			*e = append(*e, v)
		}
	}
	return nil
}

// bodies has buffers for inspects.
var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// decodeInspect reads an inspect.
func decodeInspect(body io.Reader) (container.InspectResponse, error) {
	b := bodies.Get().(*bytes.Buffer)
	defer func() {
		const most = 256 << 10
		if b.Cap() <= most {
			b.Reset()
			bodies.Put(b)
		}
	}()
	if _, err := b.ReadFrom(body); err != nil {
		return container.InspectResponse{}, err
	}
	var in inspectAnswer
	if err := json.Unmarshal(b.Bytes(), &in); err != nil {
		return container.InspectResponse{}, err
	}
	return in.docker(), nil
}

func (in *inspectAnswer) docker() container.InspectResponse {
	d := container.InspectResponse{ContainerJSONBase: &container.ContainerJSONBase{
		ID: in.ID, Created: in.Created, State: in.State, Image: in.Image, Name: in.Name,
		RestartCount: in.RestartCount}}
	if h := in.HostConfig; h != nil {
		d.HostConfig = &container.HostConfig{LogConfig: h.LogConfig,
			NetworkMode: h.NetworkMode, RestartPolicy: h.RestartPolicy,
			DNS: h.DNS, DNSSearch: h.DNSSearch,
			Resources: container.Resources{CPUShares: h.CPUShares, Memory: h.Memory,
				NanoCPUs: h.NanoCPUs, CgroupParent: h.CgroupParent,
				CPUPeriod: h.CPUPeriod, CPUQuota: h.CPUQuota}}
	}
	for _, m := range in.Mounts {
		d.Mounts = append(d.Mounts, container.MountPoint{Name: m.Name, Source: m.Source,
			Destination: m.Destination})
	}
	if c := in.Config; c != nil {
		d.Config = &container.Config{Hostname: c.Hostname, Domainname: c.Domainname,
			Env: c.Env, Image: c.Image, Labels: c.Labels}
	}
	if n := in.NetworkSettings; n != nil {
		d.NetworkSettings = &container.NetworkSettings{
			Networks: make(map[string]*network.EndpointSettings, len(n.Networks))}
		d.NetworkSettings.Ports = n.Ports
		for name, ep := range n.Networks {
			if ep == nil {
				continue
			}
			d.NetworkSettings.Networks[name] = &network.EndpointSettings{
				MacAddress: ep.MacAddress, Gateway: ep.Gateway,
				IPAddress: ep.IPAddress, IPPrefixLen: ep.IPPrefixLen,
				IPv6Gateway:         ep.IPv6Gateway,
				GlobalIPv6Address:   ep.GlobalIPv6Address,
				GlobalIPv6PrefixLen: ep.GlobalIPv6PrefixLen}
		}
	}
	return d
}
