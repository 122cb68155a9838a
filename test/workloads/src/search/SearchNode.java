package search;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import org.opensearch.common.settings.Settings;
import org.opensearch.http.HttpServerTransport;
import org.opensearch.node.InternalSettingsPreparer;
import org.opensearch.node.Node;
import org.opensearch.plugins.Plugin;
import org.opensearch.transport.Netty4Plugin;

/**
 * One OpenSearch node with its data in a directory of the caller's, its HTTP port printed as {@code READY PORT}.
 * Arguments: the data directory (on the mount), a home for what is no data, then settings as NAME=VALUE. SIGTERM ends
 * it in order.
 */
public final class SearchNode extends Node {
  private SearchNode(Settings settings, List<Class<? extends Plugin>> plugins) {
    super(InternalSettingsPreparer.prepareEnvironment(settings, Map.of(), null, () -> "search-0"), plugins, false);
  }

  public static void main(String[] args) throws Exception {
    var home = Files.createDirectories(Path.of(args[1]));
    Files.createDirectories(home.resolve("config"));
    var settings = Settings.builder()
        .put("cluster.name", "byokd-workload")
        .put("path.home", home)
        .put("path.data", args[0])
        .put("discovery.type", "single-node")
        .put("network.host", "127.0.0.1")
        .put("http.port", "0")
        .put("transport.port", "0")
        .put("transport.type", Netty4Plugin.NETTY_TRANSPORT_NAME)
        .put("http.type", Netty4Plugin.NETTY_HTTP_TRANSPORT_NAME);
    for (int i = 2; i < args.length; i++) {
      var pair = args[i].split("=", 2);
      settings.put(pair[0], pair[1]);
    }
    var node = new SearchNode(settings.build(), List.of(Netty4Plugin.class, S3RepositoryPlugin.class));
    var ended = new CountDownLatch(1);
    Runtime.getRuntime().addShutdownHook(new Thread(() -> {
      try {
        node.close();
      } catch (java.io.IOException e) {
        e.printStackTrace();
      }
      ended.countDown();
    }));
    node.start();
    var address = node.injector().getInstance(HttpServerTransport.class).boundAddress().publishAddress();
    System.out.println("READY " + address.getPort());
    ended.await();
  }
}
