package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"runtime/debug"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// sbomType is the media type of CycloneDX.
const sbomType = "application/vnd.cyclonedx+json"

// sbom lists what a binary was linked from, as the toolchain recorded it in the binary itself: nothing that is only
// in go.mod, and nothing left out. roots is the module that the certificates come from.
func sbom(p program, b binary, roots *debug.Module) ([]byte, error) {
	sum := sha256.Sum256(b.content)
	main := module(&b.info.Main, cdx.ComponentTypeApplication)
	main.Name, main.Hashes = p.name, &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum[:])}}
	main.Licenses = &cdx.Licenses{{License: &cdx.License{ID: "Apache-2.0"}}}
	components := []cdx.Component{standardLibrary(b.info.GoVersion)}
	for _, dependency := range b.info.Deps {
		if dependency.Replace != nil {
			dependency = dependency.Replace
		}
		components = append(components, module(dependency, cdx.ComponentTypeLibrary))
	}
	if roots != nil {
		certificates := module(roots, cdx.ComponentTypeData)
		certificates.Description = "the certificates of /etc/ssl/certs/ca-certificates.crt"
		components = append(components, certificates)
	}
	all := make([]string, len(components))
	for i, c := range components {
		all[i] = c.BOMRef
	}
	doc := cdx.NewBOM()
	doc.SerialNumber = serial(sum)
	doc.Metadata = &cdx.Metadata{Timestamp: b.committed().Format("2006-01-02T15:04:05Z"), Component: &main, Properties: settings(b)}
	doc.Components = &components
	doc.Dependencies = &[]cdx.Dependency{{Ref: main.BOMRef, Dependencies: &all}}
	var text bytes.Buffer
	encoder := cdx.NewBOMEncoder(&text, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false)
	if err := encoder.Encode(doc); err != nil {
		return nil, err
	}
	return text.Bytes(), nil
}

// serial is a UUID (version 8) that follows from the binary alone, so that an SBOM is as reproducible as its image.
func serial(sum [sha256.Size]byte) string {
	id := sum[:16]
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// module describes a Go module. Its h1 sum is go.sum's, of no algorithm that CycloneDX has a name for.
func module(m *debug.Module, kind cdx.ComponentType) cdx.Component {
	version := strings.Trim(m.Version, "()") // (devel)
	purl := "pkg:golang/" + m.Path + "@" + url.PathEscape(version)
	c := cdx.Component{BOMRef: purl, Type: kind, Name: m.Path, Version: version, PackageURL: purl}
	if m.Sum != "" {
		c.Properties = &[]cdx.Property{{Name: "go:sum", Value: m.Sum}}
	}
	return c
}

func standardLibrary(goVersion string) cdx.Component {
	version, _, _ := strings.Cut(strings.TrimPrefix(goVersion, "go"), " ") // "go1.26.8 X:runtimesecret"
	purl := "pkg:golang/std@" + version
	return cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: "std", Version: version, PackageURL: purl}
}

// settings are how it was built.
func settings(b binary) *[]cdx.Property {
	all := []cdx.Property{{Name: "go:version", Value: b.info.GoVersion}}
	for _, s := range b.info.Settings {
		all = append(all, cdx.Property{Name: "go:build:" + s.Key, Value: s.Value})
	}
	return &all
}
