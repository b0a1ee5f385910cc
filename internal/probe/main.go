// Command probe is what the tests run inside containers: clients of the endpoint.
//
//	probe first        asks for its task's metadata at once, prints status and body
//	probe validate     the six checks of the original sample application; exit code 42 if good
//	probe ecsmetadata  what brunoscheufler/aws-ecs-metadata-go finds by the variables
//	probe pose TAG PID  tries to pass for the container with the tag and the process
//	probe credentials  the AWS SDK's way to credentials, prints the access key id
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	ecsmetadata "github.com/brunoscheufler/aws-ecs-metadata-go"
)

const endpoint = "http://169.254.170.2"

func main() {
	var do func() error
	switch command := append(os.Args, "")[1]; command {
	case "first":
		do = first
	case "validate":
		do = validate
	case "ecsmetadata":
		do = ecsMetadata
	case "pose":
		do = pose
	case "credentials":
		do = credentials
	default:
		do = func() error { return fmt.Errorf("unknown command %q", command) }
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

// ecsMetadata prints what the library finds: a container and its task, by v4 and by v3.
func ecsMetadata() error {
	ctx := context.Background()
	v4, err := ecsmetadata.GetContainerV4(ctx, http.DefaultClient)
	if err != nil {
		return err
	}
	task, err := ecsmetadata.GetTaskV4(ctx, http.DefaultClient)
	if err != nil {
		return err
	}
	v3, err := ecsmetadata.GetContainerV3(ctx, http.DefaultClient)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"v4": v4, "task": task, "v3": v3})
}

func first() error {
	resp, err := http.Get(endpoint + "/v2/metadata")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	fmt.Printf("%d %s\n", resp.StatusCode, b)
	return err
}

// The sample application's view of the documents: what it decodes, it checks the type of.
type (
	limits    struct{ CPU, Memory uint }
	container struct {
		DockerId, Name, DockerName, Image, ImageID string
		DesiredStatus, KnownStatus, Type           string
		Labels                                     map[string]string
		Limits                                     limits
		CreatedAt, StartedAt                       time.Time
	}
	task struct {
		Cluster, TaskARN, Family, Revision, DesiredStatus, KnownStatus string
		Containers                                                     []container
		Limits                                                         limits
	}
	cpu struct {
		CPUUsage struct {
			Total uint64 `json:"total_usage"`
		} `json:"cpu_usage"`
		System uint64 `json:"system_cpu_usage"`
	}
	stats struct {
		Read   time.Time `json:"read"`
		CPU    cpu       `json:"cpu_stats"`
		PreCPU cpu       `json:"precpu_stats"`
		Memory struct {
			Usage uint64            `json:"usage"`
			Stats map[string]uint64 `json:"stats"`
		} `json:"memory_stats"`
	}
)

// validate does what the sample application of the endpoint's proposal does: no retry, no delay.
func validate() error {
	client := &http.Client{Timeout: 20 * time.Second}
	get := func(path string, into any) error {
		resp, err := client.Get(endpoint + path)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s: %s", path, resp.Status, b)
		}
		if err := json.Unmarshal(b, into); err != nil {
			return fmt.Errorf("%s: %w: %s", path, err, b)
		}
		return nil
	}
	var t task
	if err := get("/v2/metadata", &t); err != nil {
		return err
	}
	if len(t.Containers) != 2 {
		return fmt.Errorf(
			"got %d containers, want 2: the pause container and the application",
			len(t.Containers))
	}
	var id string
	for _, c := range t.Containers {
		if c.Type == "NORMAL" {
			id = c.DockerId
		}
	}
	if id == "" {
		return fmt.Errorf("no container of type NORMAL with an id: %+v", t.Containers)
	}
	if err := get("/v2/metadata/"+id, new(container)); err != nil {
		return err
	}
	if err := get("/v2/stats", new(map[string]*stats)); err != nil {
		return err
	}
	if err := get("/v2/stats/"+id, new(*stats)); err != nil {
		return err
	}
	os.Exit(42)
	return nil
}

func credentials() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := endpointcreds.New(endpoint +
		os.Getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")).Retrieve(ctx)
	if err != nil {
		return err
	}
	fmt.Println(c.AccessKeyID)
	return nil
}
