// Command image makes container images of programs that are built already. It needs no registry,
// no Docker and no root. The same input gives the same bytes.
//
//	image -ref metad:1.0 -epoch 1764130000 -out dist amd64=tree/amd64 arm64=tree/arm64
//
// Each tree is the file system of one architecture. It writes metad_1.0_linux_ARCH.image.tar for
// each, for `docker load` of any Docker Engine, and metad_1.0_oci, an OCI layout of all of them.
package main

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("image: ")
	ref := flag.String("ref", "", "`NAME:VERSION` of the image")
	epoch := flag.Int64("epoch", 0, "time of everything in it, in `seconds` since 1970")
	out := flag.String("out", "", "`directory` of what is written")
	flag.Parse()
	if err := write(*ref, time.Unix(*epoch, 0).UTC(), *out, flag.Args()); err != nil {
		log.Fatal(err)
	}
}

// write makes the images of all architectures; an architecture is given as "ARCH=TREE".
func write(ref string, created time.Time, out string, arches []string) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	base := filepath.Join(out, strings.ReplaceAll(ref, ":", "_"))
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, a := range arches {
		arch, tree, ok := strings.Cut(a, "=")
		if !ok {
			return fmt.Errorf("%q: want ARCH=TREE", a)
		}
		image, err := imageOf(tree, arch, tag, created)
		if err != nil {
			return fmt.Errorf("image for %s: %w", arch, err)
		}
		file := base + "_linux_" + arch + ".image.tar"
		if err := tarball.WriteToFile(file, tag, image); err != nil {
			return fmt.Errorf("write %q: %w", file, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image,
			Descriptor: v1.Descriptor{
				Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	path, err := layout.Write(base+"_oci", empty.Index)
	if err != nil {
		return err
	}
	return path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": tag.TagStr()}))
}

// imageOf makes the image of one tree, which has /usr/bin/metad.
func imageOf(tree, arch string, tag name.Tag, created time.Time) (v1.Image, error) {
	layerTar, err := tarOf(tree, created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layerTar)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: "linux", Architecture: arch, Created: v1.Time{Time: created},
		RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Entrypoint: []string{"/usr/bin/metad"},
			Cmd:        []string{"serve"},
			Labels: map[string]string{
				"org.opencontainers.image.title": "metad",
				"org.opencontainers.image.description": "The ECS task metadata " +
					"endpoint for every container on a Linux host",
				"org.opencontainers.image.licenses": "Apache-2.0 AND GPL-2.0-only",
				"org.opencontainers.image.version":  tag.TagStr(),
			},
		},
	})
	if err != nil {
		return nil, err
	}
	return mutate.Append(image, mutate.Addendum{Layer: layer,
		History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "metad"}})
}

// tarOf returns the tree as a tar archive: sorted by name, of root, all of one time.
func tarOf(tree string, modified time.Time) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(tree, func(file string, d fs.DirEntry, err error) error {
		if err != nil || file == tree {
			return err
		}
		return add(w, tree, file, d, modified)
	})
	if err != nil {
		return nil, err
	}
	return b.Bytes(), w.Close()
}

func add(w *tar.Writer, tree, file string, d fs.DirEntry, modified time.Time) error {
	rel, err := filepath.Rel(tree, file)
	if err != nil {
		return err
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	var link string
	if info.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(file); err != nil {
			return err
		}
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	*header = tar.Header{Typeflag: header.Typeflag, Name: filepath.ToSlash(rel),
		Linkname: link, Size: header.Size, Mode: header.Mode, ModTime: modified}
	if d.IsDir() {
		header.Name += "/"
	}
	if err := w.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
		return err
	}
	body, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	_, err = w.Write(body)
	return err
}
