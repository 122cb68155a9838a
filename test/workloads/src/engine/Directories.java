package engine;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.Comparator;
import java.util.List;
import java.util.zip.CRC32C;

/** What a store needs of directories beyond java.nio. */
final class Directories {
  private Directories() {}

  /** Makes the names in a directory durable: fsync of a descriptor that was opened for reading. */
  static void sync(Path directory) throws IOException {
    try (var channel = FileChannel.open(directory, StandardOpenOption.READ)) {
      channel.force(true);
    }
  }

  /** The regular files in a directory, sorted by name. */
  static List<Path> files(Path directory) throws IOException {
    try (var all = Files.list(directory)) {
      return all.filter(Files::isRegularFile).sorted().toList();
    }
  }

  static void delete(Path directory) throws IOException {
    if (!Files.exists(directory)) {
      return;
    }
    try (var all = Files.walk(directory)) {
      all.sorted(Comparator.reverseOrder()).forEach(path -> {
        try {
          Files.delete(path);
        } catch (IOException e) {
          throw new UncheckedIOException(e);
        }
      });
    }
  }

  static long checksum(byte[] content) {
    var crc = new CRC32C();
    crc.update(content);
    return crc.getValue();
  }
}
