package main

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// environment applies the overrides BYOKD_… to a decoded configuration and returns warnings about
// variables of that shape that mean nothing. They are not refused: Kubernetes itself sets BYOKD_PORT
// and BYOKD_SERVICE_HOST in every pod beside a Service called byokd.
func (d *decoder) environment(environ []string, into reflect.Value) (warnings []string) {
	variables := map[string]string{}
	for _, entry := range environ {
		if name, value, ok := strings.Cut(entry, "="); ok && strings.HasPrefix(name, "BYOKD_") {
			variables[name] = value
		}
	}
	d.override(variables, into, "")
	for name := range variables {
		if name == "BYOKD_REQUIRE" || strings.HasPrefix(name, "BYOKD_SERVICE_") || strings.HasPrefix(name, "BYOKD_PORT") {
			continue
		}
		warnings = append(warnings, fmt.Sprintf("the environment variable %s overrides no field and is ignored", name))
	}
	slices.Sort(warnings)
	return warnings
}

// override walks every field, taking from variables what it has used. Keys and buckets can be overridden
// when the file has them; they cannot be added, since their names lose their case in the environment.
func (d *decoder) override(variables map[string]string, into reflect.Value, path string) {
	_, scalar := into.Addr().Interface().(interface{ parse(string) error })
	switch {
	case scalar, isScalar(into.Kind()), into.Kind() == reflect.Slice:
		value, ok := variables[envName(path)]
		if !ok {
			return
		}
		delete(variables, envName(path))
		if into.Kind() == reflect.Slice {
			into.SetZero()
		}
		if err := setScalar(into, value); err != nil {
			d.problems = append(d.problems, problem{path: "environment variable " + envName(path),
				text: fmt.Sprintf("%q is %v", value, err)})
		}
	case into.Kind() == reflect.Pointer:
		d.overridePointer(variables, into, path)
	case into.Kind() == reflect.Map:
		for _, name := range into.MapKeys() {
			element := reflect.New(into.Type().Elem()).Elem()
			element.Set(into.MapIndex(name))
			d.override(variables, element, join(path, name.String()))
			into.SetMapIndex(name, element)
		}
	case into.Kind() == reflect.Struct:
		for i := range into.NumField() {
			if name := into.Type().Field(i).Tag.Get("yaml"); name != "" {
				d.override(variables, into.Field(i), join(path, name))
			}
		}
	}
}

// overridePointer makes an optional section exist only when a variable reaches into it.
func (d *decoder) overridePointer(variables map[string]string, into reflect.Value, path string) {
	if !into.IsNil() {
		d.override(variables, into.Elem(), path)
		return
	}
	section, before := reflect.New(into.Type().Elem()), len(variables)
	d.override(variables, section.Elem(), path)
	if len(variables) != before {
		into.Set(section)
	}
}
