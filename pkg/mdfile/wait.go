package mdfile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// ErrNotReady is returned by WaitFile for a file that exists but has not become READY in time.
var ErrNotReady = errors.New("metadata file is not READY")

// waitInterval is the time between two looks at the file.
const waitInterval = 20 * time.Millisecond

// WaitFile returns nil as soon as the metadata file at path is READY. It waits until ctx is done,
// and then returns an error that is ErrNotReady or says why the file could not be read, and is also
// the context's. A path that is empty or a directory is an error at once.
func WaitFile(ctx context.Context, path string) error {
	if path == "" {
		return fmt.Errorf("wait for metadata file: no path: is %s set?", EnvVar)
	}
	tick := time.NewTicker(waitInterval)
	defer tick.Stop()
	for {
		doc, err := readDocument(os.DirFS(filepath.Dir(path)), filepath.Base(path))
		if err == nil && doc.MetadataFileStatus == StatusReady {
			return nil
		}
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
			return fmt.Errorf("wait for metadata file: %s is a directory", path)
		}
		if err == nil {
			err = ErrNotReady
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for metadata file %s: %w: %w", path,
				context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}
